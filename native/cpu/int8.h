/// Products of int8: rows of activations and outputs of weights, each with a scale of its own (W8A8, symmetric, dynamic).
///
/// A row is scaled by its largest magnitude, so an outlier token costs no other token precision. The sums are int32 and exact; the epilogue turns
/// them into row scale * column scale * sum. 2^31 / 127^2 limits K.
#pragma once

#include <bit>
#include <cmath>

#include "native/cpu/gemm.h"
#include "native/cpu/int8_units.h"

namespace uniflow::cpu::UNIFLOW_ISA {

/// The largest K whose sums cannot overflow.
constexpr int64_t kInt8Steps = INT32_MAX / (127 * 127);

/// The factor of a quantised row: its largest magnitude / 127, rounded up to 16 significant bits. With these, int8 times factor is an exact
/// float32, and quantising that again gives the same int8 and factor. NaN if the row contains one.
template <class T>
static inline float row_scale(const T* row, int64_t n) {
  vi largest = {};  // bits of magnitudes compare like the magnitudes, and NaN above all
  for_lanes(n, [&](int64_t i, int lanes) {
    const vi bits = (vi)((vu)load_lanes(row + i, lanes) & 0x7fffffffu);
    largest = bits > largest ? bits : largest;
  });
  int32_t bits = 0;
  for (int i = 0; i < kWidth; ++i) bits = std::max(bits, largest[i]);
  const float exact = std::bit_cast<float>(bits) / 127;
  return exact < INFINITY ? std::bit_cast<float>((std::bit_cast<uint32_t>(exact) + 0xffu) & ~0xffu) : exact;
}

/// out[i] = row[i] / scale, rounded; zeros if the scale is not a normal number.
template <class T>
static inline void quantize_row(const T* row, int64_t n, float scale, int8_t* out) {
  constexpr float kSmallest = 1e-30f;
  const float factor = scale > kSmallest ? 1 / scale : 0.0f;
  for_lanes(n, [&](int64_t i, int lanes) { store_lanes(out + i, round_to_int(load_lanes(row + i, lanes) * factor), lanes); });
}

/// Quantises rows on the team: `values` in C order, one scale per row.
template <class T>
static void quantize_rows(const Rows<T>& in, int8_t* values, float* scales) {
  parallel_for(in.count, [&](int64_t r) {
    scales[r] = row_scale(in[r], in.width);
    quantize_row(in[r], in.width, scales[r], values + r * in.width);
  });
}

/// A packed weight: the panels, then for every column, those beyond the last included, its scale and what its sums exceed the product by.
struct Int8Weight {
  Int8Weight(int64_t out, int64_t in, const void* data)
      : panels{static_cast<const Int8Units::Panel*>(data), ceil_div(in, Int8Units::kPerUnit), ceil_div(out, kWidth)},
        scales(reinterpret_cast<float*>(reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(round_up(panel_bytes(), 64)))),
        excess(reinterpret_cast<int32_t*>(scales + columns())) {}

  int64_t columns() const { return panels.vectors * kWidth; }
  int64_t panel_bytes() const { return panels.size() * static_cast<int64_t>(sizeof(Int8Units::Panel)); }
  int64_t bytes() const { return round_up(panel_bytes(), 64) + columns() * 8; }

  Panels<Int8Units> panels;
  float* scales;
  int32_t* excess;
};

/// Packs a quantised weight [out, in] whose scales are in place already.
static void pack_int8(const Rows<int8_t>& in, const Int8Weight& to) {
  parallel_for(to.columns(), [&](int64_t c) {
    int32_t sum = 0;
    for (int64_t i = 0; c < in.count && i < in.width; ++i) sum += in[c][i];
    to.excess[c] = Int8Units::kOffset * sum;
    if (c >= in.count) to.scales[c] = 0;
  });
  pack_right_transposed(in, to.panels);
}

/// Turns tiles of integer sums into floats for `Epilogue`.
template <class Epilogue>
struct Int8Epilogue {
  void operator()(const int32_t* tile, int64_t stride, int64_t first, int64_t rows, int64_t column) const {
    alignas(64) float values[kTileSums];
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < stride; i += kWidth) {
        const vi sum = load(tile + r * stride + i) - load(weight.excess + column + i);
        store(values + r * stride + i, __builtin_convertvector(sum, vf) * (load(weight.scales + column + i) * row_scales[first + r]));
      }
    epilogue(values, stride, first, rows, column);
  }

  const Epilogue& epilogue;
  const Int8Weight& weight;
  const float* row_scales;
};

}  // namespace uniflow::cpu::UNIFLOW_ISA
