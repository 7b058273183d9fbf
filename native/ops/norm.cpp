#include "native/ops/norm.h"

#include "native/ops/check.h"

namespace uniflow::ops {

namespace {

void check_norm(const Tensor& x, const NormOptions& o) {
  if (!x || x.packing() || x.rank() < 1) reject("x", "a tensor [..., D]", describe(x));
  check_floating(x, "x");
  check_optional_vector(o.weight, "weight", x.dim(-1));
  check_optional_vector(o.bias, "bias", x.dim(-1));
  if (bool(o.scale) != bool(o.shift)) reject("scale and shift", "both or none", "one of them");
  for (const auto& [t, name] : {std::pair{o.scale, "scale"}, std::pair{o.shift, "shift"}}) {
    if (!t) continue;
    check_shape(t, name, x.shape());
    check_dtype(t, name, {x.dtype()});
  }
}

}  // namespace

Tensor norm(const SessionRef& session, const Tensor& x, const NormOptions& o) {
  check_norm(x, o);
  const int64_t width = x.dim(-1);
  Tensor out(x.device(), x.dtype(), x.shape());
  enqueue(session, {"norm", {x, o.weight, o.bias, o.scale, o.shift}, {out}, [=](const Run& run) {
    if (x.size() == 0) return;
    run.kernels.norm({.x = x.data(), .out = out.data(), .x_dtype = x.dtype(), .out_dtype = x.dtype(), .rows = x.size() / width,
                         .width = width, .x_stride = width, .out_stride = width, .rms = o.rms, .eps = o.eps,
                         .weight = float_data(o.weight), .bias = float_data(o.bias), .shift = raw_data(o.shift),
                         .scale = raw_data(o.scale), .modulation_stride = width});
  }});
  return out;
}

NormGradients norm_backward(const SessionRef& session, const Tensor& x, const Tensor& d_out, const NormOptions& o) {
  check_norm(x, o);
  check_shape(d_out, "dOut", x.shape());
  check_dtype(d_out, "dOut", {x.dtype()});
  const int64_t width = x.dim(-1);
  NormGradients g{Tensor(x.device(), x.dtype(), x.shape()), {}, {}, {}, {}};
  std::vector<Tensor> outputs{g.x};
  if (o.weight) outputs.push_back(g.weight = Tensor(x.device(), DType::Float32, {width}));
  if (o.bias) outputs.push_back(g.bias = Tensor(x.device(), DType::Float32, {width}));
  if (o.scale) outputs.insert(outputs.end(), {g.scale = Tensor(x.device(), x.dtype(), x.shape()), g.shift = Tensor(x.device(), x.dtype(), x.shape())});
  enqueue(session, {"normBackward", {x, d_out, o.weight, o.bias, o.scale}, outputs, [=](const Run& run) {
    if (x.size() == 0) return;
    run.kernels.norm_backward({.x = x.data(), .d_out = d_out.data(), .d_x = g.x.data(), .dtype = x.dtype(), .rows = x.size() / width,
                                  .width = width, .x_stride = width, .d_stride = width, .rms = o.rms, .eps = o.eps,
                                  .weight = float_data(o.weight), .bias = float_data(o.bias), .scale = raw_data(o.scale),
                                  .d_weight = g.weight ? g.weight.data<float>() : nullptr, .d_bias = g.bias ? g.bias.data<float>() : nullptr,
                                  .d_scale = g.scale ? g.scale.data() : nullptr, .d_shift = g.shift ? g.shift.data() : nullptr});
  }});
  return g;
}

}  // namespace uniflow::ops
