/// PSNR and SSIM of 8-bit images; defined in native/ops/quality.h.
#pragma once

#include <cstdint>

#include "native/core/ssim.h"

namespace uniflow::cpu {

/// a, b uint8 [images, height, width, 3] -> out [images, 2]: PSNR, SSIM.
void image_quality(const uint8_t* a, const uint8_t* b, float* out, int64_t images, int64_t height, int64_t width, SsimConvention convention);

}  // namespace uniflow::cpu
