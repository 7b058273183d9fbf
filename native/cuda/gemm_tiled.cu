/// The product that takes every size and alignment: a plain tiled kernel on the ordinary units, for what cuBLASLt refuses.
///
/// A block has a tile of 32 x 32 results, a thread four of them in one column. Tiles of both operands pass through shared memory as
/// float32; each is read along its rows in memory. Roofline bound: FLOPs at the float32 rate.
#include "native/cuda/float8.cuh"
#include "native/cuda/gemm.h"
#include "native/cuda/vectors.cuh"

namespace uniflow::cuda {
namespace {

constexpr int kTile = 32, kDown = 8, kEach = kTile / kDown;  // a block is 32 x 8 threads

/// Element (i, k) is at i * along_i + k * along_k.
template <class T>
struct Operand {
  const T* values;
  int64_t along_i, along_k;
};

__device__ inline float value(float v) { return v; }
__device__ inline float value(bf16 v) { return to_f32(v); }
__device__ inline float value(uint8_t v) { return from_e4m3(v); }

/// tile[i][k] = elements (first_i + i, first_k + k), zero outside of [0, i_end) x [0, k_end).
template <class T>
__device__ void load_tile(const Operand<T>& x, int64_t first_i, int64_t i_end, int64_t first_k, int64_t k_end, float (&tile)[kTile][kTile + 1]) {
  const int across = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int each = 0; each < kEach; ++each) {
    const int down = static_cast<int>(threadIdx.y) + each * kDown;
    const int i = x.along_k == 1 ? down : across, k = x.along_k == 1 ? across : down;
    const int64_t at_i = first_i + i, at_k = first_k + k;
    tile[i][k] = at_i < i_end && at_k < k_end ? value(x.values[at_i * x.along_i + at_k * x.along_k]) : 0.0f;
  }
}

template <class In, class Out>
__global__ void __launch_bounds__(kTile* kDown)
    tiled_kernel(Operand<In> a, Operand<In> b, Out* out, int64_t rows, int64_t inner, int64_t columns) {
  __shared__ float a_tile[kTile][kTile + 1], b_tile[kTile][kTile + 1];
  const int64_t first_row = int64_t{blockIdx.x} * kTile, first_column = int64_t{blockIdx.y} * kTile;
  float sums[kEach] = {};
  for (int64_t k = 0; k < inner; k += kTile) {
    load_tile(a, first_row, rows, k, inner, a_tile);
    load_tile(b, first_column, columns, k, inner, b_tile);
    __syncthreads();
#pragma unroll 8
    for (int i = 0; i < kTile; ++i) {
#pragma unroll
      for (int each = 0; each < kEach; ++each) sums[each] += a_tile[threadIdx.y + each * kDown][i] * b_tile[threadIdx.x][i];
    }
    __syncthreads();
  }
  const int64_t column = first_column + threadIdx.x;
#pragma unroll
  for (int each = 0; each < kEach; ++each) {
    const int64_t row = first_row + threadIdx.y + each * kDown;
    if (row < rows && column < columns) out[row * columns + column] = from_f32<Out>(sums[each]);
  }
}

template <class In, class Out>
void multiply_as(const Product& p) {
  const Operand<In> a{as<In>(p.a), p.a_transposed ? 1 : p.inner, p.a_transposed ? p.rows : 1},
      b{as<In>(p.b), p.b_transposed ? p.inner : 1, p.b_transposed ? 1 : p.columns};
  launch(tiled_kernel<In, Out>, dim3(blocks_for(p.rows, kTile), blocks_for(p.columns, kTile)), dim3(kTile, kDown), 0, a, b, as<Out>(p.out), p.rows,
         p.inner, p.columns);
}

template <class In>
void multiply_to(const Product& p) {
  if (p.out_dtype == DType::BFloat16) multiply_as<In, bf16>(p);
  else multiply_as<In, float>(p);
}

}  // namespace

void multiply_tiled(const Product& p) {
  if (p.dtype == DType::Float8) multiply_to<uint8_t>(p);
  else if (p.dtype == DType::BFloat16) multiply_to<bf16>(p);
  else multiply_to<float>(p);
}

}  // namespace uniflow::cuda
