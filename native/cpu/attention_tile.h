/// What attention and its backward pass share: units, packed panels, and the micro-kernel that multiplies them.
///
/// Units. Products run on 32-bit units: a float32, or with AVX512-BF16 a pair of bfloat16, which one vdpbf16ps multiplies
/// and adds in float32. Other machines widen bfloat16 to float32 while packing.
///
/// Packed panels, the right side of a product. A matrix of `steps` units x n vectors of columns is cut into panels of at
/// most kPanel vectors, as even as possible, each stored as [steps][vectors * kWidth] units. Rows of a head (tokens x
/// head width) are packed in two ways: transposed, with steps along the head width and columns = tokens; or as they are,
/// with steps along the tokens and columns = head width. Missing tokens and columns are zero.
#pragma once

#include <algorithm>
#include <cstring>
#include <iterator>
#include <vector>

#include "native/cpu/simd.h"

namespace uniflow::cpu::UNIFLOW_ISA {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kPanel = 4;  // vectors: kRows / 2 rows of them are accumulators for 32 registers
#else
constexpr int kPanel = 2;  // the same for 16 registers
#endif
constexpr int kRows = 12;  // rows of the left side are read, and of the product written, up to a multiple of this
constexpr int64_t kMaxHeadDim = 512;
constexpr int64_t kAhead = 24;  // tokens from the one being packed to the one being prefetched
constexpr double kLog2E = 1.44269504088896340736;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

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
  return (vf)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);  // GCC 12 warns of the unmasked one
#else
  return p * (vf)(((vu)shifted << 23) + 0x3f800000u);
#endif
}

/// One float32 per unit; T is what the tensors hold.
template <class T>
struct FloatUnits {
  using Element = T;
  using Stored = float;  // what a unit is made of
  static constexpr int kPerUnit = 1;
  static constexpr float kExp2[] = {1.534581243e-4f, 1.33999309e-3f,  9.618489072e-3f, 5.550328642e-2f,
                                    2.402264625e-1f, 6.931471825e-1f, 1.0f};  // relative error 2e-8

  static inline vf multiply_add(vf sum, vu a, vu b) { return sum + (vf)a * (vf)b; }

  /// One row of head_dim elements as units.
  static inline void load_row(const T* row, int64_t head_dim, uint32_t* units) {
    float* const out = reinterpret_cast<float*>(units);
    for_lanes(head_dim, [&](int64_t i, int lanes) { store_lanes(out + i, load_lanes(row + i, lanes), lanes); });
  }

  /// Values of two rows (`odd` may be null), or of one if a unit holds one, as units.
  template <class From>
  static inline vu interleave(const From* even, const From*, int lanes) { return (vu)load_lanes(even, lanes); }

  /// Two vectors as elements [i, i + 2 * kWidth) of a row of units, which may lie over the floats that they came from.
  static inline void store_row(float* row, int64_t i, vf a, vf b) {
    store(row + i, a);
    store(row + i + kWidth, b);
  }

  /// store_row, and sum + what was stored.
  static inline vf store_and_sum(float* row, int64_t i, vf a, vf b, vf sum) {
    store_row(row, i, a, b);
    return sum + (a + b);
  }
};

#if defined(__AVX512BF16__)
/// A pair of bfloat16 per unit, the first in the low half.
struct PairUnits {
  using Element = bf16;
  using Stored = bf16;
  static constexpr int kPerUnit = 2;
  /// Relative error 8e-5, well under the 2e-3 that rounding the weight to bfloat16 costs.
  static constexpr float kExp2[] = {5.517166853e-2f, 2.426111251e-1f, 6.932609677e-1f, 9.999280572e-1f};

  static inline vf multiply_add(vf sum, vu a, vu b) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }

  static inline void load_row(const bf16* row, int64_t head_dim, uint32_t* units) {
    int64_t i = 0;
    for (; i + 2 * kWidth <= head_dim; i += 2 * kWidth) std::memcpy(units + i / 2, row + i, sizeof(vu));
    if (i == head_dim) return;
    units[(head_dim - 1) / 2] = 0;  // whose high half an odd width leaves out
    std::memcpy(units + i / 2, row + i, static_cast<size_t>(head_dim - i) * sizeof(bf16));
  }

  static inline vu interleave(const bf16* even, const bf16* odd, int lanes) {
    return ((vu)load_lanes(even, lanes) >> 16) | (odd ? (vu)load_lanes(odd, lanes) : vu{});
  }

  static inline vu store_row(float* row, int64_t i, vf a, vf b) {
    const vu pairs = (vu)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
    std::memcpy(reinterpret_cast<bf16*>(row) + i, &pairs, sizeof pairs);
    return pairs;
  }

  /// The sum is of the rounded elements, the ones that the next product sees, so that attention's weights are 1 in all.
  static inline vf store_and_sum(float* row, int64_t i, vf a, vf b, vf sum) {
    return multiply_add(sum, store_row(row, i, a, b), vu{} + 0x3f803f80u);  // times (1, 1)
  }
};
#endif

/// Calls body(first vector, vectors) for the panels of a matrix of n vectors.
template <class Body>
static inline void for_panels(int64_t n, Body&& body) {
  const int64_t panels = ceil_div(n, kPanel);
  int64_t first = 0;
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t end = (p + 1) * n / panels;
    body(first, end - first);
    first = end;
  }
}

/// `count` tokens of one head, `width` elements each.
template <class T>
struct HeadRows {
  const T* data;
  int64_t stride, count, width;

  const T* operator[](int64_t i) const { return data + i * stride; }

  /// Rows lie a token's whole q | k | v apart, where the hardware does not see the next one coming.
  void prefetch(int64_t i) const {
    if (i >= count) return;
    for (int64_t e = 0; e < width; e += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch((*this)[i] + e);
  }
};

/// Packs the transpose: steps along the width, columns = tokens.
template <class Units>
static void pack_transposed(const HeadRows<typename Units::Element>& in, uint32_t* out) {
  alignas(64) uint32_t rows[kWidth * kMaxHeadDim];
  const int64_t steps = ceil_div(in.width, Units::kPerUnit), tile = round_up(steps, 4);
  for_panels(ceil_div(in.count, kWidth), [&](int64_t first, int64_t vectors) {
    const int64_t columns = vectors * kWidth;
    for (int64_t v = 0; v < vectors; ++v) {
      for (int64_t i = 0; i < kWidth; ++i) {
        const int64_t token = (first + v) * kWidth + i;
        in.prefetch(token + kAhead);
        if (token < in.count) Units::load_row(in[token], in.width, rows + i * tile);
        else std::fill_n(rows + i * tile, steps, 0u);
      }
      uint32_t* column = out + first * kWidth * steps + v * kWidth;
      int64_t s = 0;
      for (; s + 4 <= steps; s += 4)
        for (int64_t i = 0; i < kWidth; i += 4)
          transpose_4x4(rows + i * tile + s, tile, column + s * columns + i, columns);
      for (; s < steps; ++s)
        for (int64_t i = 0; i < kWidth; ++i) column[s * columns + i] = rows[i * tile + s];
    }
  });
}

/// Packs the rows as they are: steps along the tokens, columns = width.
template <class Units>
static void pack_rows(const HeadRows<typename Units::Element>& in, uint32_t* out) {
  const int64_t steps = ceil_div(in.count, Units::kPerUnit);
  for_panels(ceil_div(in.width, kWidth), [&](int64_t first, int64_t vectors) {
    uint32_t* to = out + first * kWidth * steps;
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t token = s * Units::kPerUnit;  // and the next one, if a unit holds two
      const auto* even = in[token];
      const auto* odd = token + 1 < in.count ? even + in.stride : nullptr;
      for (int64_t i = 0; i < Units::kPerUnit; ++i) in.prefetch(token + kAhead + i);
      for (int64_t i = first * kWidth; i < (first + vectors) * kWidth; i += kWidth, to += kWidth) {
        const int lanes = static_cast<int>(std::min<int64_t>(kWidth, in.width - i));
        store(to, Units::interleave(even + i, odd ? odd + i : nullptr, lanes));
      }
    }
  });
}

/// What becomes of a product: it replaces what was there, or is added to it, or to it times a factor per row.
enum class Into { kNew, kSum, kRescaledSum };

/// out[Rows][Vectors] from a[Rows][steps] panel[steps][Vectors]. kTransposed: a is stored as [steps][Rows]. All known when
/// compiling, or GCC keeps the sums in memory. kSum adds the finished product, so that adding the products of several
/// blocks in order gives the same bits wherever each was computed.
template <class Units, Into kInto, bool kTransposed, int Rows, int Vectors>
static inline void multiply_tile(const uint32_t* a, int64_t a_stride, const uint32_t* panel, int64_t steps,
                                 float* out, int64_t out_stride, const float* rescale) {
  vf sum[Rows][Vectors] = {};
  for (int r = 0; kInto == Into::kRescaledSum && r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) sum[r][v] = load(out + r * out_stride + v * kWidth) * rescale[r];
  for (int64_t s = 0; s < steps; ++s) {
    vu b[Vectors];
    for (int v = 0; v < Vectors; ++v) b[v] = load(panel + (s * Vectors + v) * kWidth);
    for (int r = 0; r < Rows; ++r) {
      uint32_t unit;  // may point into floats
      std::memcpy(&unit, kTransposed ? a + s * a_stride + r : a + r * a_stride + s, sizeof unit);
      const vu x = vu{} + unit;
      for (int v = 0; v < Vectors; ++v) sum[r][v] = Units::multiply_add(sum[r][v], x, b[v]);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) {
      float* const to = out + r * out_stride + v * kWidth;
      store(to, kInto == Into::kSum ? load(to) + sum[r][v] : sum[r][v]);
    }
}

/// multiply_tile over the panels of n vectors of columns and over `rows` rows, rounded up to a multiple of at most kRows.
template <class Units, Into kInto, bool kTransposed = false>
static void multiply(const uint32_t* a, int64_t a_stride, int64_t rows, const uint32_t* packed, int64_t steps,
                     int64_t n, float* out, int64_t out_stride, const float* rescale = nullptr) {
  for_panels(n, [&](int64_t first, int64_t vectors) {
    const auto panel = [&]<int Vectors>() {  // narrow panels take more rows, to have enough sums in flight
      constexpr int kTileRows = 2 * Vectors <= kPanel ? kRows : kRows / 2;
      for (int64_t r = 0; r < rows; r += kTileRows)
        multiply_tile<Units, kInto, kTransposed, kTileRows, Vectors>(
            a + (kTransposed ? r : r * a_stride), a_stride, packed + first * kWidth * steps, steps,
            out + r * out_stride + first * kWidth, out_stride, rescale ? rescale + r : nullptr);
    };
    if (vectors == 1) panel.template operator()<1>();
    if (vectors == 2) panel.template operator()<2>();
    if constexpr (kPanel == 4) {
      if (vectors == 3) panel.template operator()<3>();
      if (vectors == 4) panel.template operator()<4>();
    }
  });
}

/// Memory for packed heads, kept by the calling thread from call to call.
static uint32_t* scratch(int64_t units) {
  struct alignas(64) Line { uint32_t units[16]; };
  static thread_local std::vector<Line> memory;
  if (const auto lines = static_cast<size_t>(ceil_div(units, 16)); memory.size() < lines) memory.resize(lines);
  return memory.data()->units;
}

}  // namespace uniflow::cpu::UNIFLOW_ISA
