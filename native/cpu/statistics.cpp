/// The k largest of each row, and the covariance of columns.
///
/// The covariance is a product of the centred matrix with itself, in float64 because FID subtracts nearly equal matrices. Columns are cut
/// into panels, rows into blocks. A block is centred into panels; then every pair of panels adds its product to a tile in registers. The
/// sums follow the order of the rows for any number of threads. FLOPs: N*D*(D+1), the upper triangle.
#include <algorithm>
#include <cmath>
#include <limits>
#include <ranges>
#include <span>
#include <vector>

#include "native/core/parallel.h"
#include "native/cpu/kernels.h"
#include "native/cpu/simd.h"

namespace uniflow::cpu::UNIFLOW_ISA {
namespace {

typedef double vd __attribute__((vector_size(kWidth * 4)));
constexpr int64_t kDoubles = kWidth / 2;
constexpr int64_t kPanel = 2 * kDoubles;  // columns
constexpr int64_t kBlock = 256;           // rows
constexpr int64_t kTileRows = 4;          // x 2 vectors: as many sums as two multiply-add units keep in flight

vd load_double(const double* p) {
  vd v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

/// tile [kPanel, kPanel] += aᵀ b; a, b [rows, kPanel].
void add_product(const double* a, const double* b, double* tile, int64_t rows) {
  for (int64_t i = 0; i < kPanel; i += kTileRows) {
    vd total[kTileRows][2];
    std::memcpy(total, tile + i * kPanel, sizeof total);
    for (int64_t r = 0; r < rows; ++r) {
      const vd left = load_double(b + r * kPanel), right = load_double(b + r * kPanel + kDoubles);
      for (int64_t k = 0; k < kTileRows; ++k) {
        const double factor = a[r * kPanel + i + k];
        total[k][0] += factor * left;
        total[k][1] += factor * right;
      }
    }
    std::memcpy(tile + i * kPanel, total, sizeof total);
  }
}

/// Calls body(column inside the panel, column) for the existing columns of the panel.
template <class Body>
void for_columns(int64_t panel, int64_t width, Body&& body) {
  for (int64_t c = 0; c < kPanel && panel * kPanel + c < width; ++c) body(c, panel * kPanel + c);
}

}  // namespace

void covariance(const float* x, int64_t rows, int64_t width, float* mean, float* out) {
  const int64_t panels = (width + kPanel - 1) / kPanel, tile = kPanel * kPanel;
  std::vector<double> centre(static_cast<size_t>(width)), centred(static_cast<size_t>(panels * kBlock * kPanel)),
      tiles(static_cast<size_t>(panels * panels * tile));  // missing columns stay zero
  parallel_for(panels, [&](int64_t p) {
    double* sums = centre.data();
    for (int64_t r = 0; r < rows; ++r) for_columns(p, width, [&](int64_t, int64_t column) { sums[column] += x[r * width + column]; });
    for_columns(p, width, [&](int64_t, int64_t column) { mean[column] = static_cast<float>(sums[column] /= static_cast<double>(rows)); });
  });
  for (int64_t first = 0; first < rows; first += kBlock) {
    const int64_t count = std::min(kBlock, rows - first);
    parallel_for(panels, [&](int64_t p) {
      double* to = centred.data() + p * kBlock * kPanel;
      for (int64_t r = 0; r < count; ++r)
        for_columns(p, width, [&](int64_t c, int64_t column) { to[r * kPanel + c] = x[(first + r) * width + column] - centre.data()[column]; });
    });
    parallel_for(panels, [&](int64_t p) {
      for (int64_t q = p; q < panels; ++q)
        add_product(centred.data() + p * kBlock * kPanel, centred.data() + q * kBlock * kPanel, tiles.data() + (p * panels + q) * tile, count);
    }, true);
  }
  parallel_for(width, [&](int64_t i) {
    for (int64_t j = 0; j < width; ++j) {
      const int64_t low = std::min(i, j), high = std::max(i, j);
      const double total = tiles.data()[(low / kPanel * panels + high / kPanel) * tile + low % kPanel * kPanel + high % kPanel];
      out[i * width + j] = static_cast<float>(total / static_cast<double>(rows - 1));
    }
  });
}

void top_k(const float* scores, int64_t rows, int64_t n, int64_t k, float* values, int32_t* indices) {
  parallel_for(rows, [&](int64_t r) {
    const float* s = scores + r * n;
    auto score = [s](int32_t i) { return std::isnan(s[i]) ? -std::numeric_limits<float>::infinity() : s[i]; };
    auto before = [&](int32_t a, int32_t b) { return score(a) > score(b) || (score(a) == score(b) && a < b); };
    const std::span<int32_t> best(indices + r * k, static_cast<size_t>(k));
    std::ranges::partial_sort_copy(std::views::iota(int32_t{0}, static_cast<int32_t>(n)), best, before);
    for (int64_t i = 0; i < k; ++i) values[r * k + i] = s[best[static_cast<size_t>(i)]];
  });
}

}  // namespace uniflow::cpu::UNIFLOW_ISA
