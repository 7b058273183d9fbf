/// Long vectors in chunks, one per block, and sums of squares over them: float32 within a thread and float64 from there on, in an order that
/// depends only on the sizes.
#pragma once

#include <algorithm>
#include <type_traits>

#include "native/cuda/vectors.cuh"

namespace uniflow::cuda {

constexpr int kChunkThreads = 256;
constexpr int kFinishThreads = 1024;
constexpr int kLanes = kVector<float>;

/// One sum per block, [blocks] float64.
inline Tensor partial_sums(int64_t blocks) { return scratch(DType::UInt8, {std::max<int64_t>(blocks, 1) * static_cast<int64_t>(sizeof(double))}); }

/// Calls body(i, width) for all of [begin, end): 4 at a time if `vectors`, then one at a time. `begin` is a multiple of 4. Unroll: bodies
/// that only read have that many reads in flight.
template <int Unroll, class Body>
__device__ inline void for_elements(int64_t begin, int64_t end, bool vectors, Body&& body) {
  const int64_t split = vectors ? end - (end - begin) % kLanes : begin;
#pragma unroll Unroll
  for (int64_t i = begin + threadIdx.x * kLanes; i < split; i += kChunkThreads * kLanes) body(i, std::integral_constant<int, kLanes>{});
  for (int64_t i = split + threadIdx.x; i < end; i += kChunkThreads) body(i, std::integral_constant<int, 1>{});
}

/// A thread's sum of squares, with one accumulator per element of a vector.
struct Squares {
  float lane[kLanes] = {};

  template <int N>
  __device__ void add(const float (&v)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) lane[i] += v[i] * v[i];
  }
  __device__ double total() const { return static_cast<double>((lane[0] + lane[1]) + (lane[2] + lane[3])); }
};

/// The sum of `count` numbers, returned in all threads of the single block.
__device__ inline double sum_of(const double* partial, int64_t count) {
  double total = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < count; i += kFinishThreads) total += partial[i];
  return block_sum(total);
}

}  // namespace uniflow::cuda
