/// Kernels that go over elements or rows by vectors: 16 bytes in one access where all that they touch allows it, single elements elsewhere.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "native/cuda/device.cuh"

namespace uniflow::cuda {

/// Whether all of them can be read by 16 bytes; null pointers can.
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

/// Elements in a vector of kernels that touch these types: neighbouring threads access neighbouring memory in the widest of them.
template <class... T>
constexpr int kVectorOf = std::min({kVector<T>...});

#if defined(__CUDACC__) || defined(UNIFLOW_EMULATED)

/// load() for any number of values: by accesses of 16 bytes where N values take more.
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

/// A vector of a parameter [width] that may be null, which stands for `missing` everywhere.
template <int N, class T>
__device__ inline void load_or(const T* p, int64_t at, float missing, float (&out)[N]) {
  if (p) {
    load_values<N>(p + at, out);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = missing;
  }
}

/// Row and column of element i: division of 64 bits costs several times that of 32.
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

/// body.at<N>(i) for elements [i, i + N) of [0, n), each by a thread of its own: N at a time where `vectors` says that they are aligned,
/// which with rows also means that N divides a row, and one at a time elsewhere.
template <int N, class Body>
void each(const Body& body, int64_t n, bool vectors) {
  if (vectors) launch(each_kernel<N, Body>, blocks_for(n, int64_t{kEachBlock} * N), kEachBlock, 0, body, n);
  else launch(each_kernel<1, Body>, blocks_for(n, kEachBlock), kEachBlock, 0, body, n);
}

#endif

}  // namespace uniflow::cuda
