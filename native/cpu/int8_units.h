/// Units of products of int8: how many products an instruction adds, and how rows and panels become units (tile.h).
///
/// AVX512-VNNI multiplies and adds four pairs per 32 bits, of uint8 and int8: the left side is offset by 128, and 128 times the sum of a column
/// is subtracted at the end. All others multiply two pairs of int16 (pmaddwd): the left side is widened while packing, a panel while loading.
/// pmaddubsw has VNNI's density but saturates at 2^15, which two products reach; with the signs transferred to avoid that (psignb, pmaddubsw,
/// pmaddwd, paddd) it has as many products per instruction as pmaddwd and paddd alone.
#pragma once

#include "native/cpu/simd.h"

namespace uniflow::cpu::UNIFLOW_ISA {

#if defined(__AVX512VNNI__)
/// Four int8 per unit, the first in the lowest byte.
struct Int8Units {
  using Element = int8_t;
  using Sum = vi;
  using Stored = int8_t;
  using Panel = uint32_t;
  struct Left;
  static constexpr int kPerUnit = 4;
  static constexpr int32_t kOffset = 128;  // of the left side

  static inline vi multiply_add(vi sum, vu a, vu b) { return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b); }
  static inline void store_panel(Panel* p, vu units) { store(p, units); }

  static inline void load_row(const int8_t* row, int64_t n, uint32_t* units) {
    units[(n - 1) / 4] = 0;
    std::memcpy(units, row, static_cast<size_t>(n));
  }
};

/// Four uint8 per unit: int8 + 128. The bytes beyond the last meet zeros of the panel.
struct Int8Units::Left : Int8Units {
  static inline void load_row(const int8_t* row, int64_t n, uint32_t* units) {
    Int8Units::load_row(row, n, units);
    for (int64_t i = 0; i < (n + 3) / 4; ++i) units[i] ^= 0x80808080u;
  }
};
#else
/// Two int16 per unit, the first in the low half, from int8 panels.
struct Int8Units {
  using Element = int8_t;
  using Sum = vi;
  using Stored = int8_t;
  using Panel = uint16_t;
  using Left = Int8Units;
  static constexpr int kPerUnit = 2;
  static constexpr int32_t kOffset = 0;

  static inline vi multiply_add(vi sum, vu a, vu b) {
#if defined(__AVX512F__)
    return sum + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return sum + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return sum + (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    return sum + ((vi)(a << 16) >> 16) * ((vi)(b << 16) >> 16) + ((vi)a >> 16) * ((vi)b >> 16);
#endif
  }
  static inline void store_panel(Panel* p, vu units) {
    const vh bytes = __builtin_convertvector((units & 0xffu) | (units >> 8 & 0xff00u), vh);
    std::memcpy(p, &bytes, sizeof bytes);
  }
  static inline vu load_panel(const Panel* p) {
    vh bytes;
    std::memcpy(&bytes, p, sizeof bytes);
    const vu wide = __builtin_convertvector(bytes, vu);
    return ((vu)((vi)(wide << 24) >> 24) & 0xffffu) | ((vu)((vi)(wide << 16) >> 24) << 16);
  }

  static inline void load_row(const int8_t* row, int64_t n, uint32_t* units) {
    units[(n - 1) / 2] = 0;
    int16_t* const out = reinterpret_cast<int16_t*>(units);
    for (int64_t i = 0; i < n; ++i) out[i] = row[i];
  }
};
#endif

}  // namespace uniflow::cpu::UNIFLOW_ISA
