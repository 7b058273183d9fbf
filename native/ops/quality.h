/// How close two pictures are.
/// PSNR = 10 log10(255^2 / mean squared error), infinite for equal pictures.
/// SSIM with K1 = 0.01 and K2 = 0.03, mean over the windows inside the picture and the channels:
/// - Standard, as Wang et al. (2004): 11x11 Gaussian window (sigma 1.5); what scikit-image computes with gaussian_weights=True, sigma=1.5,
///   use_sample_covariance=False, data_range=255.
/// - Paper, as UniFlow's published notebook: 7x7 uniform window; what scikit-image computes with data_range=2 on values in [0, 1].
#pragma once

#include "native/core/ssim.h"
#include "native/ops/linear.h"

namespace uniflow::ops {

/// a, b uint8 [B, H, W, 3] -> float32 [B, 2]: PSNR in dB, SSIM (NaN where the picture is smaller than the window).
Tensor image_quality(const SessionRef& session, const Tensor& a, const Tensor& b, SsimConvention convention = SsimConvention::Standard);

}  // namespace uniflow::ops
