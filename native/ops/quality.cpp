#include "native/ops/quality.h"

#include "native/core/parallel.h"
#include "native/cpu/quality.h"
#include "native/ops/check.h"

namespace uniflow::ops {

Tensor image_quality(const SessionRef& session, const Tensor& a, const Tensor& b) {
  check_shape(a, "a", {-1, -1, -1, 3});
  check_dtype(a, "a", {DType::UInt8});
  check_shape(b, "b", a.shape());
  check_dtype(b, "b", {DType::UInt8});
  Tensor out(DType::Float32, {a.dim(0), 2});
  Stream::cpu().enqueue(session, {"imageQuality", {a, b}, {out}, [=](const CancelToken&) {
    const int64_t height = a.dim(1), width = a.dim(2), bytes = height * width * 3;
    parallel_for(a.dim(0), [&](int64_t i) {
      const uint8_t *x = a.data<uint8_t>() + i * bytes, *y = b.data<uint8_t>() + i * bytes;
      out.data<float>()[i * 2] = static_cast<float>(cpu::psnr(x, y, bytes));
      out.data<float>()[i * 2 + 1] = static_cast<float>(cpu::ssim(x, y, height, width));
    });
  }});
  return out;
}

}  // namespace uniflow::ops
