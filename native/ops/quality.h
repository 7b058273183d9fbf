/// How close two pictures are.
/// PSNR = 10 log10(255^2 / mean squared error), infinite for equal pictures. SSIM as Wang et al. (2004): 11x11 Gaussian
/// window (sigma 1.5), K1 = 0.01, K2 = 0.03, mean over the windows inside the picture and the channels; what scikit-image
/// computes with gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255.
#pragma once

#include "native/ops/linear.h"

namespace uniflow::ops {

/// a, b uint8 [B, H, W, 3] -> float32 [B, 2]: PSNR in dB, SSIM (NaN where the picture is smaller than the window).
Tensor image_quality(const SessionRef& session, const Tensor& a, const Tensor& b);

}  // namespace uniflow::ops
