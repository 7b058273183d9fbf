/// Conversion of matrices to e4m3 and back.
///
/// To e4m3: a warp has a row, which stays in its registers between the search for the maximum and the writing (one of more
/// than 16 vectors a lane is read again, from the cache). Back: a thread has a vector. Roofline bound: bytes, x read once and a quarter or half of it written.
#include "native/cuda/float8.cuh"
#include "native/cuda/kernels.h"
#include "native/cuda/vectors.cuh"

namespace uniflow::cuda {
namespace {

constexpr int kRowsEach = 4;  // per block: warps

template <int N>
__device__ float largest_of(const float (&v)[N], float so_far) {
#pragma unroll
  for (int k = 0; k < N; ++k) so_far = fmaxf(so_far, fabsf(v[k]));  // fmaxf ignores NaN
  return so_far;
}

template <int N>
__device__ void store_e4m3(uint8_t* to, const float (&v)[N], float factor) {
  Pack<uint16_t, N / 2> codes;
#pragma unroll
  for (int k = 0; k < N / 2; ++k) codes.v[k] = pack_e4m3(v[2 * k] * factor, v[2 * k + 1] * factor);
  *reinterpret_cast<Pack<uint16_t, N / 2>*>(to) = codes;
}

/// Held: vectors of a row that a lane keeps in registers.
template <class T, int Held>
__global__ void __launch_bounds__(kWarp* kRowsEach) quantise_kernel(const T* x, uint8_t* to, float* scale, int64_t rows, int width) {
  constexpr int N = kVector<T>, kStep = kWarp * N;
  const int64_t row = int64_t{blockIdx.x} * kRowsEach + threadIdx.x / kWarp;
  if (row >= rows) return;  // the whole warp
  const int first = static_cast<int>(threadIdx.x) % kWarp * N;
  x += row * width;
  to += row * width;
  Pack<T, N> held[Held];
#pragma unroll
  for (int i = 0; i < Held; ++i)
    if (const int c = first + i * kStep; c < width) held[i] = *reinterpret_cast<const Pack<T, N>*>(x + c);
  float largest = 1e-30f, v[N];  // not zero, whose inverse is infinite
#pragma unroll
  for (int i = 0; i < Held; ++i) {
    if (first + i * kStep >= width) break;
    load<N>(held[i].v, v);
    largest = largest_of(v, largest);
  }
  for (int c = first + Held * kStep; c < width; c += kStep) {
    load<N>(x + c, v);
    largest = largest_of(v, largest);
  }
  largest = warp_max(largest);
  if (first == 0) scale[row] = largest / kFloat8Largest;
  const float factor = kFloat8Largest / largest;
#pragma unroll
  for (int i = 0; i < Held; ++i) {
    if (first + i * kStep >= width) break;
    load<N>(held[i].v, v);
    store_e4m3<N>(to + first + i * kStep, v, factor);
  }
  for (int c = first + Held * kStep; c < width; c += kStep) {
    load<N>(x + c, v);
    store_e4m3<N>(to + c, v, factor);
  }
}

template <class T>
using Quantise = void (*)(const T*, uint8_t*, float*, int64_t, int);

/// The kernel with the smallest sufficient number of vectors among `Held`, or the largest: more would cost registers, and with them warps.
template <class T, int... Held>
Quantise<T> smallest(int64_t vectors) {
  Quantise<T> kernel = nullptr;
  (void)((kernel = quantise_kernel<T, Held>, vectors <= Held) || ...);
  return kernel;
}

template <class T>
struct Dequantise {
  const uint8_t* x;
  const float* scale;
  T* out;
  int64_t width;

  template <int N>
  __device__ void at(int64_t i) const {
    const Pack<uint8_t, N> codes = *reinterpret_cast<const Pack<uint8_t, N>*>(x + i);
    const float factor = scale[place_of(i, width).row];
    float v[N];
#pragma unroll
    for (int k = 0; k < N; ++k) v[k] = from_e4m3(codes.v[k]) * factor;
    store<N>(out + i, v);
  }
};

template <class T>
void quantise_as(const T* x, uint8_t* to, float* scale, int64_t rows, int64_t width) {
  const int64_t vectors = (width / kVector<T> + kWarp - 1) / kWarp;
  launch(smallest<T, 1, 2, 4, 8, 16>(vectors), blocks_for(rows, kRowsEach), kWarp * kRowsEach, 0, x, to, scale, rows, static_cast<int>(width));
}

template <class T>
void dequantise_as(const uint8_t* x, const float* scale, T* out, int64_t rows, int64_t width) {
  each<kVector<T>>(Dequantise<T>{x, scale, out, width}, rows * width, aligned({x, out}));
}

}  // namespace

void quantise_rows(const void* x, DType dtype, uint8_t* to, float* scale, int64_t rows, int64_t width) {
  Tensor copy;
  if (!aligned({x})) {
    copy = scratch(dtype, {rows, width});
    cast(x, dtype, copy.data(), dtype, rows * width);
    x = copy.data();
  }
  dispatch_float(dtype, [&]<class T> { quantise_as(as<T>(x), to, scale, rows, width); });
}

void dequantise_rows(const uint8_t* x, const float* scale, void* out, DType dtype, int64_t rows, int64_t width) {
  dispatch_float(dtype, [&]<class T> { dequantise_as(x, scale, as<T>(out), rows, width); });
}

}  // namespace uniflow::cuda
