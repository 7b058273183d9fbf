/// Eight-bit floats e4m3: sign, four exponent bits (bias 7), three mantissa bits; the largest is +-448, all ones are NaN, and there is no
/// infinity. Matrices of them have a factor per row.
#pragma once

#include "native/cuda/device.cuh"

#ifndef UNIFLOW_EMULATED
#include <cuda_fp8.h>
#endif

namespace uniflow::cuda {

constexpr float kFloat8Largest = 448;

/// x [rows, width] in Float32 or BFloat16 -> to [rows, width] in e4m3 and scale [rows], with x = to * scale. The largest value of a row
/// becomes 448. width is a multiple of 16, to is 16-byte aligned.
void quantise_rows(const void* x, DType dtype, uint8_t* to, float* scale, int64_t rows, int64_t width);

/// out [rows, width] in Float32 or BFloat16 = x * scale.
void dequantise_rows(const uint8_t* x, const float* scale, void* out, DType dtype, int64_t rows, int64_t width);

#if defined(__CUDACC__) || defined(UNIFLOW_EMULATED)

#ifdef UNIFLOW_EMULATED

/// Rounds to nearest, ties to even; larger values become +-448; NaN stays NaN.
inline uint8_t to_e4m3(float v) {
  const uint32_t bits = __float_as_uint(v), sign = bits >> 24 & 0x80u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7f;
  if (magnitude < 0x3c800000u)  // below 2^-6: multiples of 2^-9; eight of them are the code of 2^-6
    return static_cast<uint8_t>(sign | static_cast<uint32_t>(rintf(__uint_as_float(magnitude) * 512)));
  const uint32_t rounded = ((magnitude + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20) - (120u << 3);  // exponents: 127 is 7
  return static_cast<uint8_t>(sign | (rounded < 0x7eu ? rounded : 0x7eu));
}

inline uint16_t pack_e4m3(float low, float high) { return static_cast<uint16_t>(to_e4m3(low) | to_e4m3(high) << 8); }

inline float from_e4m3(uint8_t v) {
  const uint32_t sign = static_cast<uint32_t>(v & 0x80u) << 24, magnitude = v & 0x7fu;
  if (magnitude == 0x7f) return __uint_as_float(0x7fc00000u);
  if (magnitude < 8) return __uint_as_float(sign | __float_as_uint(static_cast<float>(magnitude) / 512));
  return __uint_as_float(sign | (magnitude + (120u << 3)) << 20);
}

#else

/// Packs two, `low` in the lower half, with one instruction.
__device__ inline uint16_t pack_e4m3(float low, float high) {
  return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
}

__device__ inline float from_e4m3(uint8_t v) { return __half2float(__half(__nv_cvt_fp8_to_halfraw(v, __NV_E4M3))); }

#endif

#endif

}  // namespace uniflow::cuda
