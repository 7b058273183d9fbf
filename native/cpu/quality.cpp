#include "native/cpu/quality.h"

#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "native/core/parallel.h"

namespace uniflow::cpu {
namespace {

constexpr int kRadius = 5;  // scikit-image's: int(3.5 * sigma + 0.5)
constexpr int kWindow = 2 * kRadius + 1;
constexpr int kMoments = 5;  // of a, b, a*a, b*b, a*b

std::array<double, kWindow> gaussian() {
  std::array<double, kWindow> w;
  double total = 0;
  for (int i = 0; i < kWindow; ++i) total += w[static_cast<size_t>(i)] = std::exp(-0.5 * (i - kRadius) * (i - kRadius) / (1.5 * 1.5));
  for (double& v : w) v /= total;
  return w;
}

double window_ssim(const double m[kMoments]) {
  constexpr double c1 = (0.01 * 255) * (0.01 * 255), c2 = (0.03 * 255) * (0.03 * 255);
  const double va = m[2] - m[0] * m[0], vb = m[3] - m[1] * m[1], cov = m[4] - m[0] * m[1];
  return ((2 * m[0] * m[1] + c1) * (2 * cov + c2)) / ((m[0] * m[0] + m[1] * m[1] + c1) * (va + vb + c2));
}

/// The moments of one row of one channel, blurred along the row: [width - 10][5].
void blur_row(const uint8_t* a, const uint8_t* b, int64_t width, const std::array<double, kWindow>& w, double* out) {
  for (int64_t x = 0; x + kWindow <= width; ++x) {
    double m[kMoments] = {};
    for (int64_t k = 0; k < kWindow; ++k) {
      const double p = a[(x + k) * 3], q = b[(x + k) * 3], g = w[static_cast<size_t>(k)];
      m[0] += g * p, m[1] += g * q, m[2] += g * p * p, m[3] += g * q * q, m[4] += g * p * q;
    }
    for (int i = 0; i < kMoments; ++i) out[x * kMoments + i] = m[i];
  }
}

}  // namespace

double psnr(const uint8_t* a, const uint8_t* b, int64_t count) {
  int64_t squares = 0;
  for (int64_t i = 0; i < count; ++i) squares += (int{a[i]} - b[i]) * (int{a[i]} - b[i]);
  if (squares == 0) return std::numeric_limits<double>::infinity();
  return 10 * std::log10(255.0 * 255.0 * static_cast<double>(count) / static_cast<double>(squares));
}

double ssim(const uint8_t* a, const uint8_t* b, int64_t height, int64_t width) {
  if (height < kWindow || width < kWindow) return std::numeric_limits<double>::quiet_NaN();
  static const std::array<double, kWindow> w = gaussian();
  const int64_t cols = width - kWindow + 1, rows = height - kWindow + 1, row_size = cols * kMoments;
  std::vector<double> ring(static_cast<size_t>(kWindow * row_size));  // the last 11 blurred rows
  double total = 0;
  for (int c = 0; c < 3; ++c)
    for (int64_t y = 0; y < height; ++y) {
      blur_row(a + y * width * 3 + c, b + y * width * 3 + c, width, w, ring.data() + y % kWindow * row_size);
      if (y + 1 < kWindow) continue;
      for (int64_t x = 0; x < cols; ++x) {
        double m[kMoments] = {};
        for (int64_t k = 0; k < kWindow; ++k) {
          const double* row = ring.data() + (y - kWindow + 1 + k) % kWindow * row_size + x * kMoments;
          for (int i = 0; i < kMoments; ++i) m[i] += w[static_cast<size_t>(k)] * row[i];
        }
        total += window_ssim(m);
      }
    }
  return total / static_cast<double>(3 * rows * cols);
}

void image_quality(const uint8_t* a, const uint8_t* b, float* out, int64_t images, int64_t height, int64_t width) {
  const int64_t bytes = height * width * 3;
  parallel_for(images, [&](int64_t i) {
    out[i * 2] = static_cast<float>(psnr(a + i * bytes, b + i * bytes, bytes));
    out[i * 2 + 1] = static_cast<float>(ssim(a + i * bytes, b + i * bytes, height, width));
  });
}

}  // namespace uniflow::cpu
