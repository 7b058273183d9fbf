/// Kernels over elements or rows in vectors: 16 bytes per access if all operands allow it, single elements otherwise.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "native/cuda/device.cuh"

namespace uniflow::cuda {

/// Whether all pointers are 16-byte aligned; null counts as aligned.
inline bool aligned(std::initializer_list<const void*> pointers) {
  return std::ranges::all_of(pointers, [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
}

/// A tensor's elements.
template <class T>
const T* as(const void* p) {
  return static_cast<const T*>(p);
}
template <class T>
T* as(void* p) {
  return static_cast<T*>(p);
}

/// Elements per vector in kernels that touch these types. Neighbouring threads access neighbouring memory in the widest of them.
template <class... T>
constexpr int kVectorOf = std::min({kVector<T>...});

/// load() for any number of values, in accesses of 16 bytes if N values take more.
template <int N, class T>
__device__ inline void load_values(const T* p, float (&out)[N]) {
  constexpr int kPiece = N < kVector<T> ? N : kVector<T>;
#pragma unroll
  for (int i = 0; i < N; i += kPiece) {
    float piece[kPiece];
    load<kPiece>(p + i, piece);
#pragma unroll
    for (int k = 0; k < kPiece; ++k) out[i + k] = piece[k];
  }
}

/// A vector of a parameter [width]. If the parameter is null, all values are `missing`.
template <int N, class T>
__device__ inline void load_or(const T* p, int64_t at, float missing, float (&out)[N]) {
  if (p) {
    load_values<N>(p + at, out);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = missing;
  }
}

/// Row and column of element i. 64-bit division costs several times as much as 32-bit.
struct Place {
  int64_t row, column;
};
__device__ inline Place place_of(int64_t i, int64_t width) {
  if (((i | width) >> 32) != 0) return {i / width, i % width};
  const uint32_t row = static_cast<uint32_t>(i) / static_cast<uint32_t>(width);
  return {row, static_cast<uint32_t>(i) - row * static_cast<uint32_t>(width)};
}

constexpr int kEachBlock = 256;

template <int N, class Body>
__global__ void __launch_bounds__(kEachBlock) each_kernel(Body body, int64_t n) {
  const int64_t i = (int64_t{blockIdx.x} * kEachBlock + threadIdx.x) * N;
  if (i + N <= n) {
    body.template at<N>(i);
  } else {
    for (int64_t k = i; k < n; ++k) body.template at<1>(k);
  }
}

/// Calls body.at<N>(i) for elements [i, i + N) of [0, n), each in its own thread. It handles N at a time if `vectors` says that they are
/// aligned (with rows, this also means that N divides a row), otherwise one at a time.
template <int N, class Body>
void each(const Body& body, int64_t n, bool vectors) {
  if (vectors) launch(each_kernel<N, Body>, blocks_for(n, int64_t{kEachBlock} * N), kEachBlock, 0, body, n);
  else launch(each_kernel<1, Body>, blocks_for(n, kEachBlock), kEachBlock, 0, body, n);
}

}  // namespace uniflow::cuda
