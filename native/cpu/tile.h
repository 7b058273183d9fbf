/// The inner loop of every matrix product: units, packed panels, and the micro-kernel.
///
/// Units. Products run on 32-bit units: a float32 or, with AVX512-BF16, a pair of bfloat16, which one vdpbf16ps multiplies and adds in
/// float32. Other machines widen bfloat16 to float32: the left side while packing, a panel while loading. Products of int8 have units of their
/// own (int8.h).
///
/// Packed panels, the right side of a product. A matrix of `steps` units x n column vectors is cut into panels of at most kPanel vectors,
/// as even as possible, each stored as [steps][vectors * kWidth] units. The rows of a plain matrix are packed in two ways: transposed, with
/// steps along a row and columns = rows; or untransposed, with steps along the rows and columns = columns. Missing rows and columns are
/// zero.
#pragma once

#include <algorithm>
#include <cstring>
#include <iterator>
#include <type_traits>
#include <vector>

#include "native/cpu/simd.h"

namespace uniflow::cpu::UNIFLOW_ISA {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kPanel = 4;  // vectors: kRows / 2 rows of them are accumulators in 32 registers
#else
constexpr int kPanel = 2;  // the same with 16 registers
#endif
constexpr int kRows = 12;  // rows of the left side are read, and of the product written, up to a multiple of this
constexpr int64_t kPrefetchRows = 24;  // distance from the row being packed to the row being prefetched
constexpr int64_t kPackSteps = 256;    // steps transposed at a time

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

/// One float32 per unit; T is the tensors' element type.
template <class T>
struct FloatUnits {
  using Element = T;
  using Sum = vf;
  using Stored = float;    // element of a unit in a panel
  using Panel = uint32_t;  // storage of a unit in a panel
  using Left = FloatUnits;  // the packing of the left side
  static constexpr int kPerUnit = 1;
  static constexpr float kExp2[] = {1.534581243e-4f, 1.33999309e-3f,  9.618489072e-3f, 5.550328642e-2f,
                                    2.402264625e-1f, 6.931471825e-1f, 1.0f};  // relative error 2e-8

  static inline vf multiply_add(vf sum, vu a, vu b) { return sum + (vf)a * (vf)b; }
  static inline void store_panel(Panel* p, vu units) { store(p, units); }

  /// One row of head_dim elements as units.
  static inline void load_row(const T* row, int64_t head_dim, uint32_t* units) {
    float* const out = reinterpret_cast<float*>(units);
    for_lanes(head_dim, [&](int64_t i, int lanes) { store_lanes(out + i, load_lanes(row + i, lanes), lanes); });
  }

  /// Values of two rows (`odd` may be null), or of one if a unit holds one, as units.
  template <class From>
  static inline vu interleave(const From* even, const From*, int lanes) { return (vu)load_lanes(even, lanes); }

  /// Stores two vectors as elements [i, i + 2 * kWidth) of a row of units, which may overlap the floats they were computed from.
  static inline void store_row(float* row, int64_t i, vf a, vf b) {
    store(row + i, a);
    store(row + i + kWidth, b);
  }

  /// store_row; returns sum + the stored values.
  static inline vf store_and_sum(float* row, int64_t i, vf a, vf b, vf sum) {
    store_row(row, i, a, b);
    return sum + (a + b);
  }
};

/// bfloat16 panels on a machine without bfloat16 products: a panel is widened before it is multiplied.
struct WidenedUnits : FloatUnits<bf16> {
  using Stored = bf16;
  using Panel = bf16;
  static inline void store_panel(Panel* p, vu units) { store(p, (vf)units); }
  static inline vu load_panel(const Panel* p) { return (vu)load(p); }
};

#if defined(__AVX512BF16__)
/// A pair of bfloat16 per unit, the first in the low half.
struct PairUnits {
  using Element = bf16;
  using Sum = vf;
  using Stored = bf16;
  using Panel = uint32_t;
  using Left = PairUnits;
  static constexpr int kPerUnit = 2;
  /// Relative error 8e-5, well below the 2e-3 of rounding the weight to bfloat16.
  static constexpr float kExp2[] = {5.517166853e-2f, 2.426111251e-1f, 6.932609677e-1f, 9.999280572e-1f};

  static inline vf multiply_add(vf sum, vu a, vu b) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
  static inline void store_panel(Panel* p, vu units) { store(p, units); }

  static inline void load_row(const bf16* row, int64_t head_dim, uint32_t* units) {
    int64_t i = 0;
    for (; i + 2 * kWidth <= head_dim; i += 2 * kWidth) std::memcpy(units + i / 2, row + i, sizeof(vu));
    if (i == head_dim) return;
    units[(head_dim - 1) / 2] = 0;  // clear the high half, which an odd width leaves unset
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

  /// Sums the rounded elements, which are the ones used by the next product, so attention's weights add up to 1.
  static inline vf store_and_sum(float* row, int64_t i, vf a, vf b, vf sum) {
    return multiply_add(sum, store_row(row, i, a, b), vu{} + 0x3f803f80u);  // times (1, 1)
  }
};
#endif

/// Calls body(first vector, vectors) for each panel of a matrix of n vectors.
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

/// Rows of a plain matrix, `stride` elements apart.
template <class T>
struct Rows {
  const T* data;
  int64_t stride, count, width;

  const T* operator[](int64_t i) const { return data + i * stride; }

  /// Prefetches elements of a row. Rows can be far apart, so the hardware may not predict the access.
  void prefetch(int64_t i) const { prefetch(i, 0, width); }
  void prefetch(int64_t i, int64_t first, int64_t n) const {
    if (i >= count) return;
    for (int64_t e = 0; e < n; e += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch((*this)[i] + first + e);
  }
};

/// Vectors [first, first + vectors) of a packed matrix's columns.
struct PanelRange {
  int64_t first, vectors;
};

/// Packs steps [begin, end) of a panel of the transpose: steps along the width, columns = rows.
template <class Units>
static void pack_transposed(const Rows<typename Units::Element>& in, PanelRange panel, int64_t begin, int64_t end, typename Units::Panel* out) {
  alignas(64) uint32_t rows[kWidth * kPackSteps], tile[kWidth * kPackSteps];
  const int64_t columns = panel.vectors * kWidth;
  for (; begin < end; begin += kPackSteps) {
    const int64_t steps = std::min(kPackSteps, end - begin), stride = round_up(steps, 4);
    const int64_t first = begin * Units::kPerUnit, width = std::min(steps * Units::kPerUnit, in.width - first);
    for (int64_t v = 0; v < panel.vectors; ++v) {
      for (int64_t i = 0; i < kWidth; ++i) {
        const int64_t row = (panel.first + v) * kWidth + i;
        in.prefetch(row + kPrefetchRows, first, width);
        if (row < in.count) Units::load_row(in[row] + first, width, rows + i * stride);
        else std::fill_n(rows + i * stride, steps, 0u);
      }
      int64_t s = 0;
      for (; s + 4 <= steps; s += 4)
        for (int64_t i = 0; i < kWidth; i += 4) transpose_4x4(rows + i * stride + s, stride, tile + s * kWidth + i, kWidth);
      for (; s < steps; ++s)
        for (int64_t i = 0; i < kWidth; ++i) tile[s * kWidth + i] = rows[i * stride + s];
      for (s = 0; s < steps; ++s) Units::store_panel(out + (begin + s) * columns + v * kWidth, load(tile + s * kWidth));
    }
  }
}

/// Packs steps [begin, end) of a panel of the untransposed rows: steps along the rows, columns = columns.
template <class Units>
static void pack_rows(const Rows<typename Units::Element>& in, PanelRange panel, int64_t begin, int64_t end, typename Units::Panel* out) {
  const int64_t columns = panel.vectors * kWidth, first = panel.first * kWidth;
  for (int64_t s = begin; s < end; ++s) {
    const int64_t row = s * Units::kPerUnit;  // and the next row, if a unit holds two
    const auto* even = in[row];
    const auto* odd = row + 1 < in.count ? even + in.stride : nullptr;
    for (int64_t i = 0; i < Units::kPerUnit; ++i) in.prefetch(row + kPrefetchRows + i, first, columns);
    for (int64_t c = 0; c < columns; c += kWidth) {
      const int64_t i = first + c;
      const int lanes = static_cast<int>(std::min<int64_t>(kWidth, in.width - i));
      Units::store_panel(out + s * columns + c, Units::interleave(even + i, odd ? odd + i : nullptr, lanes));
    }
  }
}

/// Calls body.template operator()<vectors>() with a compile-time constant.
template <class Body>
static inline void with_vectors(int64_t vectors, Body&& body) {
  if (vectors == 1) body.template operator()<1>();
  if (vectors == 2) body.template operator()<2>();
  if constexpr (kPanel == 4) {
    if (vectors == 3) body.template operator()<3>();
    if (vectors == 4) body.template operator()<4>();
  }
}

/// Rows of a tile that is `vectors` wide. Narrow tiles are higher, to keep enough sums in flight.
constexpr int tile_rows(int vectors) { return 2 * vectors <= kPanel ? kRows : kRows / 2; }

/// Elements of the sums of a product: float, or int32_t.
template <class Units>
using SumElement = std::remove_cvref_t<decltype(typename Units::Sum{}[0])>;

/// The destination of a product: it replaces the old value, or is added to it, or to it times a factor per row.
enum class Into { kNew, kSum, kRescaledSum };

/// out[Rows][Vectors] from a[Rows][steps] panel[steps][Vectors]. kTransposed: a is stored as [steps][Rows]. All are compile-time constants,
/// otherwise GCC keeps the sums in memory. kSum adds the finished product, so adding the products of several blocks in order gives the same
/// bits wherever each was computed. kPrefetch: every step also fetches a line of `next` into the second-level cache; steps are `next_step`
/// bytes apart.
template <class Units, Into kInto, bool kTransposed, int Rows, int Vectors, bool kPrefetch = false>
static inline void multiply_tile(const uint32_t* a, int64_t a_stride, const uint32_t* panel, int64_t steps,
                                 SumElement<Units>* out, int64_t out_stride, const float* rescale, const char* next = nullptr,
                                 int64_t next_step = 0) {
  typename Units::Sum sum[Rows][Vectors] = {};
  if constexpr (kInto == Into::kRescaledSum) {
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < Vectors; ++v) sum[r][v] = load(out + r * out_stride + v * kWidth) * rescale[r];
  }
  for (int64_t s = 0; s < steps; ++s) {
    if constexpr (kPrefetch) __builtin_prefetch(next + s * next_step, 0, 2);
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
      SumElement<Units>* const to = out + r * out_stride + v * kWidth;
      store(to, kInto == Into::kSum ? load(to) + sum[r][v] : sum[r][v]);
    }
}

/// Memory for packed matrices, kept by the calling thread across calls.
static uint32_t* scratch(int64_t units) {
  struct alignas(64) Line { uint32_t units[16]; };
  static thread_local std::vector<Line> memory;
  if (const auto lines = static_cast<size_t>(ceil_div(units, 16)); memory.size() < lines) memory.resize(lines);
  return memory.data()->units;
}

}  // namespace uniflow::cpu::UNIFLOW_ISA
