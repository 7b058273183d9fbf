/// Eight-bit floats e4m3: sign, four exponent bits (bias 7), three mantissa bits; the largest is +-448, all ones are NaN, and there is no
/// infinity. Matrices of them have a factor per row.
#pragma once

#include <cuda_fp8.h>

#include "native/cuda/device.cuh"

namespace uniflow::cuda {

constexpr float kFloat8Largest = 448;

/// x [rows, width] in Float32 or BFloat16 -> to [rows, width] in e4m3 and scale [rows], with x = to * scale. The largest value of a row
/// becomes 448. width is a multiple of 16, to is 16-byte aligned.
void quantise_rows(const void* x, DType dtype, uint8_t* to, float* scale, int64_t rows, int64_t width);

/// out [rows, width] in Float32 or BFloat16 = x * scale.
void dequantise_rows(const uint8_t* x, const float* scale, void* out, DType dtype, int64_t rows, int64_t width);

/// Packs two, `low` in the lower half, with one instruction.
__device__ inline uint16_t pack_e4m3(float low, float high) {
  return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
}

__device__ inline float from_e4m3(uint8_t v) { return __half2float(__half(__nv_cvt_fp8_to_halfraw(v, __NV_E4M3))); }

}  // namespace uniflow::cuda
