#include "native/ops/linear.h"

#include "native/ops/check.h"

namespace uniflow::ops {

namespace {

/// The weight must not be empty.
void check_weight(const Tensor& weight) {
  if (!weight || weight.rank() != 2 || weight.size() == 0) reject("weight", "a linear weight [out, in]", describe(weight));
  check_dtype(weight, "weight", {DType::Float32, DType::BFloat16, DType::Float8, DType::Int8});
}

/// Float32 and int8 weights accept both types of x; float8 weights require bfloat16.
bool multiplies(const Tensor& weight, DType x) {
  if (weight.dtype() == DType::Float8) return x == DType::BFloat16;
  return weight.dtype() == x || (weight.packing() && (weight.dtype() == DType::Float32 || weight.dtype() == DType::Int8));
}

}  // namespace

Tensor pack_linear(const SessionRef& session, const Tensor& weight, DType dtype) {
  check_weight(weight);
  check_shape(weight, "weight", {-1, -1});
  if (dtype == DType::UInt8 || dtype == DType::Int32) reject("dtype", "float32, bfloat16, float8 or int8", name_of(dtype));
  const Kernels& k = weight.device().kernels();
  const auto packing = k.linear_packing(weight.dim(0), weight.dim(1), dtype);
  Tensor out(weight.device(), dtype, weight.shape(), packing, k.packed_bytes(*packing));
  enqueue(session, {"packLinear", {weight}, {out}, [=](const Run& run) {
    run.kernels.pack(*packing, weight.data(), weight.dtype(), out.data());
  }});
  return out;
}

Tensor unpack_linear(const SessionRef& session, const Tensor& weight) {
  if (!weight || !weight.packing()) reject("weight", "a packed linear weight", describe(weight));
  Tensor out(weight.device(), DType::Float32, weight.shape());
  enqueue(session, {"unpackLinear", {weight}, {out}, [=](const Run& run) {
    run.kernels.unpack(*weight.packing(), weight.data(), out.data(), DType::Float32);
  }});
  return out;
}

Tensor linear(const SessionRef& session, const Tensor& x, const Tensor& weight, const LinearOptions& o) {
  check_weight(weight);
  if (x && !multiplies(weight, x.dtype())) reject("weight", std::string(name_of(x.dtype())) + ", as x", describe(weight));
  if (!x || x.packing() || x.rank() < 1 || x.dim(-1) != weight.dim(1))
    reject("x", "a tensor [..., " + std::to_string(weight.dim(1)) + "]", describe(x));
  check_floating(x, "x");
  const int64_t n = weight.dim(0);
  check_optional_vector(o.bias, "bias", n);
  check_optional_vector(o.scale, "scale", n);
  Shape shape = x.shape();
  shape.back() = n;
  if (o.residual) {
    check_shape(o.residual, "residual", shape);
    check_dtype(o.residual, "residual", {x.dtype()});
  }
  Tensor out(x.device(), x.dtype(), shape);
  enqueue(session, {"linear", {x, weight, o.bias, o.scale, o.residual}, {out}, [=](const Run& run) {
    if (x.size() == 0) return;
    run.kernels.linear({.x = x.data(), .weight = weight.data(), .packing = weight.packing().get(), .out = out.data(),
                        .rows = x.size() / x.dim(-1), .in = x.dim(-1), .width = n, .x_dtype = x.dtype(), .out_dtype = out.dtype(), .bias = float_data(o.bias),
                 .scale = float_data(o.scale), .residual = raw_data(o.residual), .activation = o.activation});
  }});
  return out;
}

LinearGradients linear_backward(const SessionRef& session, const Tensor& x, const Tensor& weight, const Tensor& d_out, bool want_x,
                                bool want_weight, bool want_bias) {
  check_weight(weight);
  check_shape(weight, "weight", {-1, -1});
  const int64_t n = weight.dim(0), k = weight.dim(1);
  if (!x || x.packing() || x.rank() < 1 || x.dim(-1) != k) reject("x", "a tensor [..., " + std::to_string(k) + "]", describe(x));
  Shape shape = x.shape();
  shape.back() = n;
  check_shape(d_out, "dOut", shape);
  check_dtype(x, "x", {weight.dtype()});
  check_dtype(d_out, "dOut", {weight.dtype()});
  LinearGradients g;
  std::vector<Tensor> outputs;
  auto make = [&](bool wanted, DType dtype, const Shape& s) {
    if (!wanted) return Tensor();
    outputs.emplace_back(x.device(), dtype, s);
    return outputs.back();
  };
  g.x = make(want_x, x.dtype(), x.shape());
  g.weight = make(want_weight, DType::Float32, {n, k});
  g.bias = make(want_bias, DType::Float32, {n});
  enqueue(session, {"linearBackward", {x, weight, d_out}, outputs, [=](const Run& run) {
    if (x.size() == 0) {  // an empty sum
      for (const Tensor& t : outputs) run.kernels.copy_rows(t.data(), 0, nullptr, 0, t.bytes(), 1);
      return;
    }
    run.kernels.linear_backward({.x = x.data(), .weight = weight.data(), .d_out = d_out.data(), .dtype = x.dtype(), .rows = x.size() / k, .in = k,
                          .out = n, .d_x = g.x ? g.x.data() : nullptr, .d_weight = g.weight ? g.weight.data<float>() : nullptr,
                          .d_bias = g.bias ? g.bias.data<float>() : nullptr});
  }});
  return g;
}

}  // namespace uniflow::ops
