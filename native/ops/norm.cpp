#include "native/ops/norm.h"

#include "native/cpu/kernels.h"
#include "native/ops/check.h"

namespace uniflow::ops {

Tensor norm(const SessionRef& session, const Tensor& x, const NormOptions& o) {
  if (!x || x.packing() || x.rank() < 1) reject("x", "a tensor [..., D]", describe(x));
  check_floating(x, "x");
  const int64_t width = x.dim(-1);
  check_optional_vector(o.weight, "weight", width);
  check_optional_vector(o.bias, "bias", width);
  if (bool(o.scale) != bool(o.shift)) reject("scale and shift", "both or none", "one of them");
  for (const auto& [t, name] : {std::pair{o.scale, "scale"}, std::pair{o.shift, "shift"}}) {
    if (!t) continue;
    check_shape(t, name, x.shape());
    check_dtype(t, name, {x.dtype()});
  }
  Tensor out(x.dtype(), x.shape());
  Stream::cpu().enqueue(session, {"norm", {x, o.weight, o.bias, o.scale, o.shift}, {out}, [=](const CancelToken&) {
    if (x.size() == 0) return;
    cpu::kernels().norm({.x = x.data(), .out = out.data(), .x_dtype = x.dtype(), .out_dtype = x.dtype(), .rows = x.size() / width,
                         .width = width, .x_stride = width, .out_stride = width, .rms = o.rms, .eps = o.eps,
                         .weight = float_data(o.weight), .bias = float_data(o.bias), .shift = raw_data(o.shift),
                         .scale = raw_data(o.scale), .modulation_stride = width});
  }});
  return out;
}

}  // namespace uniflow::ops
