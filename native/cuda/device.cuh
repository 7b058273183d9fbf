/// Basics of all kernels: launching, bfloat16, 16-byte vectors, sums over warps and blocks.
///
/// native/test/emulator compiles the same sources with the host's compiler, and runs them on the CPU, thread by thread: on its include path are
/// twins of CUDA's headers and of native/cuda/hardware. For this reason, kernels use CUDA only through this file.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <dynamic_shared.cuh>

#include <cstdint>
#include <utility>

#include "native/cuda/runtime.h"

namespace uniflow::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

/// Queues kernel(args...) on this thread's stream. Throws the launch error reported by CUDA.
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, Args&&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream();
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...), "kernel launch");
}

/// Number of blocks of `per_block` that cover n.
inline unsigned blocks_for(int64_t n, int64_t per_block) { return static_cast<unsigned>((n + per_block - 1) / per_block); }

// --- numbers ---------------------------------------------------------------------------------------------------

__device__ inline float to_f32(float v) { return v; }
__device__ inline float to_f32(bf16 v) { return __uint_as_float(static_cast<unsigned>(v.bits) << 16); }

/// Rounds to nearest, ties to even.
template <class T>
__device__ inline T from_f32(float v) {
  if constexpr (sizeof(T) == 4) {
    return v;
  } else {
    return bf16{__bfloat16_as_ushort(__float2bfloat16_rn(v))};
  }
}

/// Two bfloat16 in one register, `low` in the lower half.
__device__ inline uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(v);
}

/// N values that are loaded and stored in one access, up to 16 bytes wide.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};

/// Number of values of T in 16 bytes.
template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

/// Loads N consecutive values as float; p is aligned to N of them.
template <int N, class T>
__device__ inline void load(const T* p, float (&out)[N]) {
  const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(p);
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = to_f32(pack.v[i]);
}

template <int N, class T>
__device__ inline void store(T* p, const float (&in)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.v[i] = from_f32<T>(in[i]);
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

// --- sums over threads, in a fixed order, so results are identical in every run --------------------------------------

/// Sum (or maximum) over the 32 lanes, returned in all of them.
template <class T>
__device__ inline T warp_sum(T v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(kAllLanes, v, offset);
  return v;
}

__device__ inline float warp_max(float v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, offset));
  return v;
}

/// Sum over all threads of a one-dimensional block (a multiple of 32), returned in all of them.
template <class T>
__device__ inline T block_sum(T v) {
  __shared__ T partial[kWarp];
  const int warps = static_cast<int>(blockDim.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  v = warp_sum(v);
  __syncthreads();  // all threads have read the sums of an earlier call
  if (lane == 0) partial[threadIdx.x / kWarp] = v;
  __syncthreads();
  return warp_sum(lane < warps ? partial[lane] : T{});
}

}  // namespace uniflow::cuda
