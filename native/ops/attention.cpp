#include "native/ops/attention.h"

#include <cmath>
#include <tuple>

#include "native/ops/check.h"

namespace uniflow::ops {
namespace {

/// Checks [B, S, 3*D] and returns D.
int64_t check_qkv(const Tensor& qkv, int64_t heads) {
  check_shape(qkv, "qkv", {-1, -1, -1});
  check_floating(qkv, "qkv");
  check_positive(heads, "heads");
  if (qkv.dim(2) % (3 * heads) != 0)
    reject("qkv", "a last dimension divisible by 3 * " + std::to_string(heads) + " heads", describe(qkv));
  return qkv.dim(2) / 3;
}

constexpr int64_t kMaxHeadDim = 512;  // a kernel keeps one row of a head on the stack

void check_head_dim(const Tensor& qkv, int64_t heads) {
  const int64_t head_dim = qkv.dim(2) / 3 / heads;
  if (head_dim > kMaxHeadDim)
    throw Error(ErrorCode::Unsupported, "heads", "heads up to " + std::to_string(kMaxHeadDim) + " wide", std::to_string(head_dim));
}

}  // namespace

namespace {

void enqueue_attention(const SessionRef& session, const Tensor& qkv, int64_t heads, const Tensor& out, const Tensor& log_sum_exp) {
  std::vector<Tensor> outputs{out};
  if (log_sum_exp) outputs.push_back(log_sum_exp);
  enqueue(session, {"attention", {qkv}, std::move(outputs), [=](const Run& run) {
    const int64_t head_dim = qkv.dim(2) / 3 / heads;
    if (out.size() == 0) return;
    run.kernels.attention({.qkv = qkv.data(), .out = out.data(), .dtype = qkv.dtype(), .batch = qkv.dim(0), .seq = qkv.dim(1),
                              .heads = heads, .head_dim = head_dim, .scale = 1.0f / std::sqrt(static_cast<float>(head_dim)),
                              .log_sum_exp = log_sum_exp ? log_sum_exp.data<float>() : nullptr});
  }});
}

}  // namespace

Tensor attention(const SessionRef& session, const Tensor& qkv, int64_t heads) {
  const int64_t width = check_qkv(qkv, heads);
  check_head_dim(qkv, heads);
  Tensor out(qkv.device(), qkv.dtype(), {qkv.dim(0), qkv.dim(1), width});
  enqueue_attention(session, qkv, heads, out, {});
  return out;
}

AttentionForward attention_forward(const SessionRef& session, const Tensor& qkv, int64_t heads) {
  const int64_t width = check_qkv(qkv, heads);
  check_head_dim(qkv, heads);
  AttentionForward f{Tensor(qkv.device(), qkv.dtype(), {qkv.dim(0), qkv.dim(1), width}), Tensor(qkv.device(), DType::Float32, {qkv.dim(0), heads, qkv.dim(1)})};
  enqueue_attention(session, qkv, heads, f.out, f.log_sum_exp);
  return f;
}

Tensor attention_backward(const SessionRef& session, const Tensor& qkv, const Tensor& out, const Tensor& d_out, const Tensor& log_sum_exp,
                          int64_t heads) {
  const int64_t width = check_qkv(qkv, heads), head_dim = width / heads;
  check_head_dim(qkv, heads);
  for (const auto& [t, name] : {std::pair{out, "out"}, std::pair{d_out, "dOut"}}) {
    check_shape(t, name, {qkv.dim(0), qkv.dim(1), width});
    check_dtype(t, name, {qkv.dtype()});
  }
  check_shape(log_sum_exp, "logSumExp", {qkv.dim(0), heads, qkv.dim(1)});
  check_dtype(log_sum_exp, "logSumExp", {DType::Float32});
  Tensor d_qkv(qkv.device(), qkv.dtype(), qkv.shape());
  enqueue(session, {"attentionBackward", {qkv, out, d_out, log_sum_exp}, {d_qkv}, [=](const Run& run) {
    if (out.size() == 0) return;
    run.kernels.attention_backward({.qkv = qkv.data(), .out = out.data(), .d_out = d_out.data(), .log_sum_exp = log_sum_exp.data<float>(),
                                       .d_qkv = d_qkv.data(), .dtype = qkv.dtype(), .batch = qkv.dim(0), .seq = qkv.dim(1), .heads = heads,
                                       .head_dim = head_dim, .scale = 1.0f / std::sqrt(static_cast<float>(head_dim))});
  }});
  return d_qkv;
}

Tensor qk_norm(const SessionRef& session, const Tensor& qkv, const Tensor& q_weight, const Tensor& k_weight, float eps) {
  const int64_t width = check_qkv(qkv, 1);
  check_optional_vector(q_weight, "qWeight", width);
  check_optional_vector(k_weight, "kWeight", width);
  Tensor out(qkv.device(), qkv.dtype(), qkv.shape());
  enqueue(session, {"qkNorm", {qkv, q_weight, k_weight}, {out}, [=](const Run& run) {
    const int64_t rows = qkv.dim(0) * qkv.dim(1), bytes = 3 * width * size_of(qkv.dtype());
    run.kernels.copy_rows(out.data(), bytes, qkv.data(), bytes, bytes, rows);
    for (const auto& [column, weight] : {std::pair{int64_t{0}, q_weight}, std::pair{width, k_weight}}) {
      std::byte* part = out.data<std::byte>() + column * size_of(out.dtype());
      run.kernels.norm({.x = part, .out = part, .x_dtype = out.dtype(), .out_dtype = out.dtype(), .rows = rows, .width = width,
                           .x_stride = 3 * width, .out_stride = 3 * width, .rms = true, .eps = eps, .weight = float_data(weight),
                           .bias = nullptr});
    }
  }});
  return out;
}

QkNormGradients qk_norm_backward(const SessionRef& session, const Tensor& qkv, const Tensor& d_out, const Tensor& q_weight,
                                 const Tensor& k_weight, float eps) {
  const int64_t width = check_qkv(qkv, 1);
  check_shape(d_out, "dOut", qkv.shape());
  check_dtype(d_out, "dOut", {qkv.dtype()});
  for (const auto& [t, name] : {std::pair{q_weight, "qWeight"}, std::pair{k_weight, "kWeight"}}) {
    check_shape(t, name, {width});
    check_dtype(t, name, {DType::Float32});
  }
  QkNormGradients g{Tensor(qkv.device(), qkv.dtype(), qkv.shape()), Tensor(qkv.device(), DType::Float32, {width}), Tensor(qkv.device(), DType::Float32, {width})};
  enqueue(session, {"qkNormBackward", {qkv, d_out, q_weight, k_weight}, {g.qkv, g.q_weight, g.k_weight}, [=](const Run& run) {
    const int64_t rows = qkv.dim(0) * qkv.dim(1), bytes = 3 * width * size_of(qkv.dtype());
    run.kernels.copy_rows(g.qkv.data(), bytes, d_out.data(), bytes, bytes, rows);  // v's gradient passes through
    for (const auto& [column, weight, d_weight] : {std::tuple{int64_t{0}, q_weight, g.q_weight}, std::tuple{width, k_weight, g.k_weight}}) {
      const int64_t offset = column * size_of(qkv.dtype());
      run.kernels.norm_backward({.x = qkv.data<std::byte>() + offset, .d_out = d_out.data<std::byte>() + offset,
                                    .d_x = g.qkv.data<std::byte>() + offset, .dtype = qkv.dtype(), .rows = rows,
                                    .width = width, .x_stride = 3 * width, .d_stride = 3 * width, .rms = true, .eps = eps,
                                    .weight = float_data(weight), .bias = nullptr, .scale = nullptr, .d_weight = d_weight.data<float>(),
                                    .d_bias = nullptr, .d_scale = nullptr, .d_shift = nullptr});
    }
  }});
  return g;
}

Tensor rope(const SessionRef& session, const Tensor& qkv, int64_t heads, int64_t prefix, const Tensor& table, bool inverse) {
  const int64_t width = check_qkv(qkv, heads), head_dim = width / heads;
  if (head_dim % 2 != 0) reject("heads", "an even head width", std::to_string(head_dim));
  if (prefix < 0 || prefix > qkv.dim(1)) reject("prefix", "0 to " + std::to_string(qkv.dim(1)), std::to_string(prefix));
  check_shape(table, "table", {2, qkv.dim(1) - prefix, head_dim});
  check_dtype(table, "table", {DType::Float32});
  Tensor out(qkv.device(), qkv.dtype(), qkv.shape());
  enqueue(session, {"rope", {qkv, table}, {out}, [=](const Run& run) {
    run.kernels.rope({.qkv = qkv.data(), .out = out.data(), .dtype = qkv.dtype(), .batch = qkv.dim(0), .seq = qkv.dim(1),
                         .heads = heads, .head_dim = head_dim, .prefix = prefix, .cosine = table.data<float>(),
                         .sine = table.data<float>() + table.size() / 2, .inverse = inverse});
  }});
  return out;
}

Tensor rope_table(const SessionRef& session, int64_t rows, int64_t cols, int64_t head_dim, float theta, RopeUnit unit) {
  check_grid(rows, cols);
  check_positive(head_dim, "headDim");
  if (head_dim % 4 != 0) reject("headDim", "a multiple of 4", std::to_string(head_dim));
  Tensor out(session->device(), DType::Float32, {2, rows * cols, head_dim});
  enqueue(session, {"ropeTable", {}, {out}, [=](const Run& run) {
    run.kernels.rope_table(rows, cols, head_dim, theta, unit, out.data<float>());
  }});
  return out;
}

}  // namespace uniflow::ops
