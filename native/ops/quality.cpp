#include "native/ops/quality.h"

#include "native/ops/check.h"

namespace uniflow::ops {

Tensor image_quality(const SessionRef& session, const Tensor& a, const Tensor& b, SsimConvention convention) {
  check_shape(a, "a", {-1, -1, -1, 3});
  check_dtype(a, "a", {DType::UInt8});
  check_shape(b, "b", a.shape());
  check_dtype(b, "b", {DType::UInt8});
  Tensor out(a.device(), DType::Float32, {a.dim(0), 2});
  enqueue(session, {"imageQuality", {a, b}, {out}, [=](const Run& run) {
    run.kernels.image_quality(a.data<uint8_t>(), b.data<uint8_t>(), out.data<float>(), a.dim(0), a.dim(1), a.dim(2), convention);
  }});
  return out;
}

}  // namespace uniflow::ops
