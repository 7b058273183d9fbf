/// Stands in for CUDA's header.
#pragma once

#include <cuda_runtime.h>

#include "native/core/dtype.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

/// Rounds to nearest, ties to even.
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return {uniflow::to_bf16(v).bits}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) { return {__float2bfloat16_rn(low), __float2bfloat16_rn(high)}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) { return v.bits; }
