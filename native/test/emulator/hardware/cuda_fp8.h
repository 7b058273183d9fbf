/// Stands in for CUDA's header: e4m3 alone.
#pragma once

#include <cuda_runtime.h>

enum __nv_saturation_t { __NV_SATFINITE };
enum __nv_fp8_interpretation_t { __NV_E4M3 };

struct __half_raw {
  float value;  // every e4m3 is a half
};
struct __half {
  explicit __half(__half_raw raw) : value(raw.value) {}
  float value;
};
inline float __half2float(__half v) { return v.value; }

namespace emulator {

/// Rounds to nearest, ties to even; larger values become +-448; NaN stays NaN.
inline uint8_t to_e4m3(float v) {
  const uint32_t bits = __float_as_uint(v), sign = bits >> 24 & 0x80u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7f;
  if (magnitude < 0x3c800000u)  // below 2^-6: multiples of 2^-9; eight of them are the code of 2^-6
    return static_cast<uint8_t>(sign | static_cast<uint32_t>(rintf(__uint_as_float(magnitude) * 512)));
  const uint32_t rounded = ((magnitude + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20) - (120u << 3);  // exponents: 127 is 7
  return static_cast<uint8_t>(sign | (rounded < 0x7eu ? rounded : 0x7eu));
}

inline float from_e4m3(uint8_t v) {
  const uint32_t sign = static_cast<uint32_t>(v & 0x80u) << 24, magnitude = v & 0x7fu;
  if (magnitude == 0x7f) return __uint_as_float(0x7fc00000u);
  if (magnitude < 8) return __uint_as_float(sign | __float_as_uint(static_cast<float>(magnitude) / 512));
  return __uint_as_float(sign | (magnitude + (120u << 3)) << 20);
}

}  // namespace emulator

inline uint16_t __nv_cvt_float2_to_fp8x2(float2 v, __nv_saturation_t, __nv_fp8_interpretation_t) {
  return static_cast<uint16_t>(emulator::to_e4m3(v.x) | emulator::to_e4m3(v.y) << 8);
}
inline __half_raw __nv_cvt_fp8_to_halfraw(uint8_t v, __nv_fp8_interpretation_t) { return {emulator::from_e4m3(v)}; }
