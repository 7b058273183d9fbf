#include "native/cpu/quality.h"

#include <cmath>
#include <limits>
#include <vector>

#include "native/core/parallel.h"

namespace uniflow::cpu {
namespace {

constexpr int kMoments = 5;  // of a, b, a*a, b*b, a*b

template <int kSize>
double window_ssim(const double m[kMoments], const SsimWindow<kSize>& w) {
  const double va = w.unbiased * (m[2] - m[0] * m[0]), vb = w.unbiased * (m[3] - m[1] * m[1]), cov = w.unbiased * (m[4] - m[0] * m[1]);
  return ((2 * m[0] * m[1] + w.c1) * (2 * cov + w.c2)) / ((m[0] * m[0] + m[1] * m[1] + w.c1) * (va + vb + w.c2));
}

/// The moments of one row of one channel, averaged along the row: [width - kSize + 1][5].
template <int kSize>
void average_row(const uint8_t* a, const uint8_t* b, int64_t width, const SsimWindow<kSize>& w, double* out) {
  for (int64_t x = 0; x + kSize <= width; ++x) {
    double m[kMoments] = {};
    for (int64_t k = 0; k < kSize; ++k) {
      const double p = a[(x + k) * 3], q = b[(x + k) * 3], g = w.weight[k];
      m[0] += g * p, m[1] += g * q, m[2] += g * p * p, m[3] += g * q * q, m[4] += g * p * q;
    }
    for (int i = 0; i < kMoments; ++i) out[x * kMoments + i] = m[i];
  }
}

double psnr(const uint8_t* a, const uint8_t* b, int64_t count) {
  int64_t squares = 0;
  for (int64_t i = 0; i < count; ++i) squares += (int{a[i]} - b[i]) * (int{a[i]} - b[i]);
  if (squares == 0) return std::numeric_limits<double>::infinity();
  return 10 * std::log10(255.0 * 255.0 * static_cast<double>(count) / static_cast<double>(squares));
}

template <int kSize>
double ssim(const uint8_t* a, const uint8_t* b, int64_t height, int64_t width, const SsimWindow<kSize>& w) {
  if (height < kSize || width < kSize) return std::numeric_limits<double>::quiet_NaN();
  const int64_t cols = width - kSize + 1, rows = height - kSize + 1, row_size = cols * kMoments;
  std::vector<double> ring(static_cast<size_t>(kSize * row_size));  // the last kSize averaged rows
  double total = 0;
  for (int c = 0; c < 3; ++c)
    for (int64_t y = 0; y < height; ++y) {
      average_row(a + y * width * 3 + c, b + y * width * 3 + c, width, w, ring.data() + y % kSize * row_size);
      if (y + 1 < kSize) continue;
      for (int64_t x = 0; x < cols; ++x) {
        double m[kMoments] = {};
        for (int64_t k = 0; k < kSize; ++k) {
          const double* row = ring.data() + (y - kSize + 1 + k) % kSize * row_size + x * kMoments;
          for (int i = 0; i < kMoments; ++i) m[i] += w.weight[k] * row[i];
        }
        total += window_ssim(m, w);
      }
    }
  return total / static_cast<double>(3 * rows * cols);
}

}  // namespace

void image_quality(const uint8_t* a, const uint8_t* b, float* out, int64_t images, int64_t height, int64_t width, SsimConvention convention) {
  const int64_t bytes = height * width * 3;
  with_ssim_window(convention, [&](const auto& window) {
    parallel_for(images, [&](int64_t i) {
      out[i * 2] = static_cast<float>(psnr(a + i * bytes, b + i * bytes, bytes));
      out[i * 2 + 1] = static_cast<float>(ssim(a + i * bytes, b + i * bytes, height, width, window));
    });
  });
}

}  // namespace uniflow::cpu
