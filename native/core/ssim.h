/// The windows and constants of SSIM, shared by the devices.
#pragma once

#include <cmath>

namespace uniflow {

/// Standard: Wang et al. (2004). Paper: the notebook published with UniFlow; its larger constants give higher values.
enum class SsimConvention { Standard, Paper };

/// A separable window and its constants. Values are in [0, 255].
template <int kSize>
struct SsimWindow {
  static constexpr int size = kSize;
  double weight[kSize];  // sum 1
  double c1, c2;         // (0.01 range)^2, (0.03 range)^2
  double unbiased;       // factor for variances and covariance: 1, or n / (n - 1) for sample estimates
};

inline SsimWindow<11> standard_ssim_window() {
  SsimWindow<11> w{.weight = {}, .c1 = (0.01 * 255) * (0.01 * 255), .c2 = (0.03 * 255) * (0.03 * 255), .unbiased = 1};
  double total = 0;
  for (int i = 0; i < w.size; ++i) total += w.weight[i] = std::exp(-0.5 * (i - 5) * (i - 5) / (1.5 * 1.5));
  for (double& v : w.weight) v /= total;
  return w;
}

inline SsimWindow<7> paper_ssim_window() {
  constexpr double range = 2 * 255;  // data_range=2 on values in [0, 1]
  SsimWindow<7> w{.weight = {}, .c1 = (0.01 * range) * (0.01 * range), .c2 = (0.03 * range) * (0.03 * range), .unbiased = 49.0 / 48};
  for (double& v : w.weight) v = 1.0 / w.size;
  return w;
}

/// Calls `f` with the window of the convention.
template <class F>
void with_ssim_window(SsimConvention convention, F f) {
  if (convention == SsimConvention::Paper)
    f(paper_ssim_window());
  else
    f(standard_ssim_window());
}

}  // namespace uniflow
