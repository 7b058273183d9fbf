#include "native/ops/residual.h"

#include "native/ops/check.h"

namespace uniflow::ops {
namespace {

void check_plain(const Tensor& x, const char* name) {
  if (!x || x.packing() || x.rank() < 1) reject(name, "a plain tensor", describe(x));
  check_floating(x, name);
}

void check_like(const Tensor& t, const char* name, const Tensor& like) {
  check_shape(t, name, like.shape());
  check_dtype(t, name, {like.dtype()});
}

}  // namespace

Tensor activation(const SessionRef& session, const Tensor& x, Activation kind) {
  check_plain(x, "x");
  Tensor out(x.device(), x.dtype(), x.shape());
  enqueue(session, {"activation", {x}, {out}, [=](const Run& run) {
    run.kernels.activation(kind, x.data(), out.data(), x.dtype(), x.size());
  }});
  return out;
}

Tensor activation_backward(const SessionRef& session, const Tensor& x, const Tensor& d_out, Activation kind) {
  check_plain(x, "x");
  check_like(d_out, "dOut", x);
  Tensor out(x.device(), x.dtype(), x.shape());
  enqueue(session, {"activationBackward", {x, d_out}, {out}, [=](const Run& run) {
    run.kernels.activation_backward(kind, x.data(), d_out.data(), out.data(), x.dtype(), x.size());
  }});
  return out;
}

Tensor scale_add(const SessionRef& session, const Tensor& residual, const Tensor& branch, const Tensor& scale, const Tensor& gate) {
  check_plain(branch, "branch");
  check_like(residual, "residual", branch);
  const int64_t width = branch.dim(-1);
  check_optional_vector(scale, "scale", width);
  if (gate) check_like(gate, "gate", branch);
  Tensor out(branch.device(), branch.dtype(), branch.shape());
  enqueue(session, {"scaleAdd", {residual, branch, scale, gate}, {out}, [=](const Run& run) {
    if (out.size() == 0) return;
    run.kernels.scale_add({.residual = residual.data(), .branch = branch.data(), .out = out.data(), .dtype = out.dtype(),
                              .rows = out.size() / width, .width = width, .scale = float_data(scale), .gate = raw_data(gate)});
  }});
  return out;
}

ScaleAddGradients scale_add_backward(const SessionRef& session, const Tensor& d_out, const Tensor& branch, const Tensor& scale, const Tensor& gate) {
  check_plain(branch, "branch");
  check_like(d_out, "dOut", branch);
  const int64_t width = branch.dim(-1);
  check_optional_vector(scale, "scale", width);
  if (gate) check_like(gate, "gate", branch);
  ScaleAddGradients g{Tensor(branch.device(), branch.dtype(), branch.shape()), {}, {}};
  std::vector<Tensor> outputs{g.branch};
  if (scale) outputs.push_back(g.scale = Tensor(branch.device(), DType::Float32, {width}));
  if (gate) outputs.push_back(g.gate = Tensor(branch.device(), branch.dtype(), branch.shape()));
  enqueue(session, {"scaleAddBackward", {d_out, branch, scale, gate}, outputs, [=](const Run& run) {
    if (branch.size() == 0) return;
    run.kernels.scale_add_backward({.d_out = d_out.data(), .branch = branch.data(), .d_branch = g.branch.data(), .dtype = branch.dtype(),
                                       .rows = branch.size() / width, .width = width, .scale = float_data(scale), .gate = raw_data(gate),
                                       .d_scale = g.scale ? g.scale.data<float>() : nullptr, .d_gate = g.gate ? g.gate.data() : nullptr});
  }});
  return g;
}

Tensor swiglu_backward(const SessionRef& session, const Tensor& x, const Tensor& d_out) {
  check_plain(x, "x");
  Shape half = x.shape();
  half.back() /= 2;
  check_shape(d_out, "dOut", half);
  check_dtype(d_out, "dOut", {x.dtype()});
  Tensor out(x.device(), x.dtype(), x.shape());
  enqueue(session, {"swigluBackward", {x, d_out}, {out}, [=](const Run& run) {
    if (d_out.size()) run.kernels.swiglu_backward(x.data(), d_out.data(), out.data(), x.dtype(), d_out.size() / half.back(), half.back());
  }});
  return out;
}

Tensor add(const SessionRef& session, const Tensor& a, const Tensor& b, const Tensor& factor, int64_t index, float scale) {
  check_plain(b, "b");
  if (a) check_like(a, "a", b);
  if (factor) {
    check_shape(factor, "factor", {-1});
    check_dtype(factor, "factor", {DType::Float32});
    if (index < 0 || index >= factor.dim(0)) reject("index", "an element of the factor", std::to_string(index));
  }
  Tensor out(b.device(), b.dtype(), b.shape());
  enqueue(session, {"add", {a, b, factor}, {out}, [=](const Run& run) {
    run.kernels.add(raw_data(a), b.data(), factor ? factor.data<float>() + index : nullptr, scale, out.data(), b.dtype(), b.size());
  }});
  return out;
}

Tensor sum_rows(const SessionRef& session, const Tensor& x, int kept) {
  check_plain(x, "x");
  if (kept < 1 || kept > x.rank()) reject("kept", "1 to " + std::to_string(x.rank()) + " dimensions", std::to_string(kept));
  const Shape shape(x.shape().end() - kept, x.shape().end());
  Tensor out(x.device(), DType::Float32, shape);
  enqueue(session, {"sumRows", {x}, {out}, [=](const Run& run) {
    if (out.size()) run.kernels.column_sum(x.data(), out.data<float>(), x.dtype(), x.size() / out.size(), out.size());
  }});
  return out;
}

Tensor split(const SessionRef& session, const Tensor& x, int64_t part, int64_t parts) {
  check_plain(x, "x");
  if (parts < 1 || x.dim(-1) % parts || part < 0 || part >= parts) reject("part", "one of " + std::to_string(parts) + " equal parts of " + to_string(x.shape()), std::to_string(part));
  Shape shape = x.shape();
  shape.back() /= parts;
  Tensor out(x.device(), x.dtype(), shape);
  enqueue(session, {"split", {x}, {out}, [=](const Run& run) {
    const int64_t bytes = shape.back() * size_of(x.dtype());
    if (bytes) run.kernels.copy_rows(out.data(), bytes, x.data<std::byte>() + part * bytes, parts * bytes, bytes, out.bytes() / bytes);
  }});
  return out;
}

Tensor concat(const SessionRef& session, const std::vector<Tensor>& parts) {
  Tensor like;
  for (const Tensor& p : parts)
    if (p) like = p;
  check_plain(like, "parts");
  for (const Tensor& p : parts)
    if (p) check_like(p, "parts", like);
  const int64_t n = static_cast<int64_t>(parts.size());
  Shape shape = like.shape();
  shape.back() *= n;
  Tensor out(like.device(), like.dtype(), shape);
  enqueue(session, {"concat", parts, {out}, [=](const Run& run) {
    const int64_t bytes = like.dim(-1) * size_of(like.dtype());
    if (bytes == 0) return;
    for (int64_t p = 0; p < n; ++p) {
      const Tensor& part = parts[static_cast<size_t>(p)];
      run.kernels.copy_rows(out.data<std::byte>() + p * bytes, n * bytes, raw_data(part), bytes, bytes, like.bytes() / bytes);
    }
  }});
  return out;
}

}  // namespace uniflow::ops
