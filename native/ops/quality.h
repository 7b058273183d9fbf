/// Similarity of two images.
/// PSNR = 10 log10(255^2 / mean squared error), infinite for equal images.
/// SSIM with K1 = 0.01 and K2 = 0.03, mean over the channels and the windows inside the image:
/// - Standard, as in Wang et al. (2004): 11x11 Gaussian window (sigma 1.5); equals scikit-image with gaussian_weights=True, sigma=1.5,
///   use_sample_covariance=False, data_range=255.
/// - Paper, as in UniFlow's published notebook: 7x7 uniform window; equals scikit-image with data_range=2 on values in [0, 1].
#pragma once

#include "native/core/ssim.h"
#include "native/ops/linear.h"

namespace uniflow::ops {

/// a, b uint8 [B, H, W, 3] -> float32 [B, 2]: PSNR in dB, SSIM (NaN if the image is smaller than the window).
Tensor image_quality(const SessionRef& session, const Tensor& a, const Tensor& b, SsimConvention convention = SsimConvention::Standard);

}  // namespace uniflow::ops
