/// Shared by attention and its backward pass, on top of tile.h: exponentials, the packing of a head, and products with many rows.
#pragma once

#include <iterator>

#include "native/cpu/tile.h"

namespace uniflow::cpu::UNIFLOW_ISA {

constexpr int64_t kMaxHeadDim = 512;
constexpr double kLog2E = 1.44269504088896340736;

/// 2^t for t <= 0 (or just above), by a minimax polynomial on [-1/2, 1/2]; NaN stays NaN.
template <class Units>
static inline vf exp2(vf t) {
#if !defined(__AVX512F__)
  t = max(splat(-125.0f), t);
#endif
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const vf shifted = t + magic;
  const vf n = shifted - magic;
  vf p = splat(Units::kExp2[0]);
  for (size_t i = 1; i < std::size(Units::kExp2); ++i) p = p * (t - n) + Units::kExp2[i];
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);  // GCC 12 warns about the unmasked form
#else
  return p * (vf)(((vu)shifted << 23) + 0x3f800000u);
#endif
}

/// Packs all panels of the transpose of a head's rows.
template <class Units>
static void pack_transposed(const Rows<typename Units::Element>& in, uint32_t* out) {
  const int64_t steps = ceil_div(in.width, Units::kPerUnit);
  for_panels(ceil_div(in.count, kWidth), [&](int64_t first, int64_t vectors) { pack_transposed<Units>(in, {first, vectors}, 0, steps, out + first * kWidth * steps); });
}

/// Packs all panels of a head's rows, untransposed.
template <class Units>
static void pack_rows(const Rows<typename Units::Element>& in, uint32_t* out) {
  const int64_t steps = ceil_div(in.count, Units::kPerUnit);
  for_panels(ceil_div(in.width, kWidth), [&](int64_t first, int64_t vectors) { pack_rows<Units>(in, {first, vectors}, 0, steps, out + first * kWidth * steps); });
}

/// multiply_tile over the panels of n column vectors and over `rows` rows, rounded up to a multiple of at most kRows.
template <class Units, Into kInto, bool kTransposed = false>
static void multiply(const uint32_t* a, int64_t a_stride, int64_t rows, const uint32_t* packed, int64_t steps,
                     int64_t n, float* out, int64_t out_stride, const float* rescale = nullptr) {
  for_panels(n, [&](int64_t first, int64_t vectors) {
    with_vectors(vectors, [&]<int Vectors>() {
      constexpr int kTileRows = tile_rows(Vectors);
      for (int64_t r = 0; r < rows; r += kTileRows)
        multiply_tile<Units, kInto, kTransposed, kTileRows, Vectors>(
            a + (kTransposed ? r : r * a_stride), a_stride, packed + first * kWidth * steps, steps,
            out + r * out_stride + first * kWidth, out_stride, rescale ? rescale + r : nullptr);
    });
  });
}

}  // namespace uniflow::cpu::UNIFLOW_ISA
