/// PSNR and SSIM of 8-bit pictures; definitions in native/ops/quality.h.
#pragma once

#include <cstdint>

namespace uniflow::cpu {

/// a, b uint8 [images, height, width, 3] -> out [images, 2]: PSNR, SSIM.
void image_quality(const uint8_t* a, const uint8_t* b, float* out, int64_t images, int64_t height, int64_t width);

double psnr(const uint8_t* a, const uint8_t* b, int64_t count);
double ssim(const uint8_t* a, const uint8_t* b, int64_t height, int64_t width);  // packed RGB

}  // namespace uniflow::cpu
