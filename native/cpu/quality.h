/// PSNR and SSIM of 8-bit pictures; definitions in native/ops/quality.h.
#pragma once

#include <cstdint>

namespace uniflow::cpu {

double psnr(const uint8_t* a, const uint8_t* b, int64_t count);
double ssim(const uint8_t* a, const uint8_t* b, int64_t height, int64_t width);  // packed RGB

}  // namespace uniflow::cpu
