/// float32 vectors of the width of the instruction set that this file is compiled for.
///
/// Every kernel source that includes this header is compiled once per instruction set (see CMakeLists.txt), inside `namespace
/// uniflow::cpu::UNIFLOW_ISA`; dispatch.cpp picks one at run time. It uses GCC/Clang vector extensions, so the portable build has no
/// special needs and also compiles for arm64. Intrinsics appear only where the extensions have no equivalent.
/// compiles for arm64 as well; intrinsics appear only where the extensions have no word for it.
///
/// Everything here is `static inline`. The linker would merge a shared inline function, compiled for AVX-512 in one object and for the
/// baseline in another, into one of the two.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "native/core/dtype.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#ifndef UNIFLOW_ISA
#error "UNIFLOW_ISA names the instruction set: avx512bf16, avx512, avx2 or portable"
#endif

namespace uniflow::cpu::UNIFLOW_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float vf __attribute__((vector_size(kWidth * 4)));
typedef int32_t vi __attribute__((vector_size(kWidth * 4)));
typedef uint32_t vu __attribute__((vector_size(kWidth * 4)));
typedef uint16_t vh __attribute__((vector_size(kWidth * 2)));
typedef uint8_t vb __attribute__((vector_size(kWidth)));
typedef int8_t vc __attribute__((vector_size(kWidth)));

static inline vf splat(float x) { return vf{} + x; }

static inline vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
static inline vf load(const bf16* p) {
  vh h;
  std::memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vu) << 16);
}
static inline vf load(const uint8_t* p) {
  vb b;
  std::memcpy(&b, p, sizeof b);
  return __builtin_convertvector(__builtin_convertvector(b, vi), vf);
}
static inline vu load(const uint32_t* p) {
  vu v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

static inline vi load(const int32_t* p) {
  vi v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

static inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
static inline void store(uint32_t* p, vu v) { std::memcpy(p, &v, sizeof v); }
static inline void store(int32_t* p, vi v) { std::memcpy(p, &v, sizeof v); }
static inline void store(int8_t* p, vi v) {
  const vc bytes = __builtin_convertvector(v, vc);
  std::memcpy(p, &bytes, sizeof bytes);
}

/// Rounds to nearest, ties to even, like `to_bf16`.
static inline vh round_bf16(vf v) {
#if defined(__AVX512BF16__)
  return (vh)_mm512_cvtneps_pbh((__m512)v);
#else
  vu u = (vu)v;
  vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  vu nan = (u >> 16) | 0x40u;
  vu is_nan = (vu)((u & 0x7fffffffu) > 0x7f800000u);
  return __builtin_convertvector((rounded & ~is_nan) | (nan & is_nan), vh);
#endif
}
static inline void store(bf16* p, vf v) {
  vh h = round_bf16(v);
  std::memcpy(p, &h, sizeof h);
}

/// Rounds to the nearest integer, ties to even; NaN gives INT32_MIN or 0.
static inline vi round_to_int(vf v) {
#if defined(__AVX512F__)
  return (vi)_mm512_maskz_cvtps_epi32(static_cast<__mmask16>(-1), (__m512)v);  // unmasked, GCC 12 warns of its own header
#elif defined(__AVX2__)
  return (vi)_mm256_cvtps_epi32((__m256)v);
#elif defined(__SSE2__)
  return (vi)_mm_cvtps_epi32((__m128)v);
#else
  vi out;
  for (int i = 0; i < kWidth; ++i) out[i] = static_cast<int32_t>(__builtin_rintf(v[i]));
  return out;
#endif
}

/// The last `n` (1 <= n < kWidth) elements of a row; missing lanes read as zero.
template <class T>
static inline vf load_tail(const T* p, int n) {
  T buffer[kWidth] = {};
  std::memcpy(buffer, p, static_cast<size_t>(n) * sizeof(T));
  return load(buffer);
}
template <class T, class V>
static inline void store_tail(T* p, V v, int n) {
  T buffer[kWidth];
  store(buffer, v);
  std::memcpy(p, buffer, static_cast<size_t>(n) * sizeof(T));
}

static inline float sum(vf v) {
  float s = 0;
  for (int i = 0; i < kWidth; ++i) s += v[i];
  return s;
}
static inline vf max(vf a, vf b) { return a > b ? a : b; }
static inline vf min(vf a, vf b) { return a < b ? a : b; }

template <int By, int... Lane>
static inline vf rotate(vf v, std::integer_sequence<int, Lane...>) {
  return __builtin_shufflevector(v, v, ((Lane + By) % kWidth)...);
}
/// The largest lane, by a tree of rotations by kWidth / 2, ..., 1. A chain of kWidth comparisons would cost attention as much as its
/// exponentials.
template <int By = kWidth / 2>
static inline float max(vf v) {
  if constexpr (By == 0) return v[0];
  else return max<By / 2>(max(v, rotate<By>(v, std::make_integer_sequence<int, kWidth>{})));
}

/// columns[s * stride + i] = rows[i * row_stride + s] for 4 rows and 4 units.
static inline void transpose_4x4(const uint32_t* rows, int64_t row_stride, uint32_t* columns,
                                 int64_t stride) {
  typedef uint32_t quad __attribute__((vector_size(16)));
  quad r[4];
  for (int i = 0; i < 4; ++i) std::memcpy(&r[i], rows + i * row_stride, sizeof(quad));
  const quad a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5);
  const quad b = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5);
  const quad c = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
  const quad d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
  const quad t[4] = {__builtin_shufflevector(a, b, 0, 1, 4, 5), __builtin_shufflevector(a, b, 2, 3, 6, 7),
                     __builtin_shufflevector(c, d, 0, 1, 4, 5), __builtin_shufflevector(c, d, 2, 3, 6, 7)};
  for (int i = 0; i < 4; ++i) std::memcpy(columns + i * stride, &t[i], sizeof(quad));
}

/// e^x, relative error below 2e-7 on [-87, 88]; below that flushes to 0, above saturates.
static inline vf exp(vf x) {
  x = min(max(x, splat(-87.3f)), splat(88.3f));
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  vf n = (x * 1.44269504088896341f + magic) - magic;
  vf r = x - n * 0.693145751953125f;  // ln 2 in two parts, the first exact in a few bits
  r = r - n * 1.42860682030941723212e-6f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  vi bits = (__builtin_convertvector(n, vi) + 127) << 23;
  return p * (vf)bits;
}

/// Loops `body(offset, load, store)` over a row of n elements, whole vectors first, then the tail.
/// `body(i, lanes)` gets lanes == kWidth for whole vectors.
template <class Body>
static inline void for_lanes(int64_t n, Body&& body) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) body(i, kWidth);
  if (i < n) body(i, static_cast<int>(n - i));
}
template <class T>
static inline vf load_lanes(const T* p, int lanes) {
  return lanes == kWidth ? load(p) : load_tail(p, lanes);
}
template <class T, class V>
static inline void store_lanes(T* p, V v, int lanes) {
  if (lanes == kWidth) store(p, v);
  else store_tail(p, v, lanes);
}

}  // namespace uniflow::cpu::UNIFLOW_ISA
