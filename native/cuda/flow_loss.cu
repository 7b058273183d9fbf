/// The loss of rectified flow: the training pair, and the mean squared error with its gradient. A block has a range of the elements.
/// Roofline bound: both inputs read, the outputs written.
#include "native/cuda/chunks.cuh"
#include "native/cuda/kernels.h"

namespace uniflow::cuda {
namespace {

constexpr int64_t kErrorChunk = 1 << 12;

__global__ void __launch_bounds__(kChunkThreads)
    squared_error(const float* v, const float* target, float* grad, float scale, int64_t n, bool vectors, double* partial) {
  const int64_t begin = blockIdx.x * kErrorChunk, end = begin + kErrorChunk < n ? begin + kErrorChunk : n;
  Squares squares;
  for_elements<2>(begin, end, vectors, [&](int64_t i, auto width) {
    float d[width()], t[width()];
    load(v + i, d);
    load(target + i, t);
#pragma unroll
    for (int k = 0; k < width(); ++k) d[k] -= t[k];
    squares.add(d);
#pragma unroll
    for (int k = 0; k < width(); ++k) d[k] *= scale;
    if (grad) store(grad + i, d);
  });
  const double total = block_sum(squares.total());
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kFinishThreads) mean_of_sum(const double* partial, int64_t count, int64_t n, float* out) {
  const double total = sum_of(partial, count);
  if (threadIdx.x == 0) *out = static_cast<float>(total / static_cast<double>(n));
}

struct Interpolate {
  const float *data, *noise, *t;
  float *noisy, *target;
  int64_t width;

  template <int N>
  __device__ void at(int64_t i) const {
    const float share = t[place_of(i, width).row];
    float x[N], e[N], mixed[N], difference[N];
    load(data + i, x);
    load(noise + i, e);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      mixed[k] = share * x[k] + (1.0f - share) * e[k];
      difference[k] = x[k] - e[k];
    }
    store(noisy + i, mixed);
    store(target + i, difference);
  }
};

}  // namespace

void mean_squared_error(const float* v, const float* target, float* grad, float* loss, int64_t n) {
  const unsigned blocks = blocks_for(n, kErrorChunk);
  const Tensor partial = partial_sums(blocks);
  launch(squared_error, blocks, kChunkThreads, 0, v, target, grad, 2.0f / static_cast<float>(n), n, aligned({v, target, grad}),
         partial.data<double>());
  launch(mean_of_sum, 1, kFinishThreads, 0, partial.data<double>(), blocks, n, loss);
}

void interpolate(const float* data, const float* noise, const float* t, float* noisy, float* target, int64_t rows, int64_t width) {
  const bool vectors = width % kLanes == 0 && aligned({data, noise, noisy, target});
  each<kLanes>(Interpolate{data, noise, t, noisy, target, width}, rows * width, vectors);
}

}  // namespace uniflow::cuda
