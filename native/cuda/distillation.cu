/// Layer-wise cosine distillation: loss, layer weights, and the gradient in one pass over student and teacher.
///
/// Per token: dot = s.t, |s|, |t|, then d(1 - cos)/ds = -(t/|t| - cos * s/|s|) / |s|. A warp has one token of one layer and keeps its packs
/// of both rows in registers from the sums to the gradient. So memory is read once and all loads are in flight together. Rows of more than
/// 2048 values, and rows that are not 16-byte aligned, are read twice. The grid is (tokens, layers): one launch for up to 64 layers. Blocks
/// write the sum of their tokens' 1 - cosine; one block computes alpha, weights and loss from these sums. Roofline bound: bytes of both
/// stacks read + the gradient written.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "native/cuda/kernels.h"
#include "native/cuda/vectors.cuh"

namespace uniflow::cuda {
namespace {

constexpr float kLive = 1e-8f;  // a token with a norm up to this has cosine 0 and no gradient
constexpr int kTokens = 4;      // per block, one warp each; small blocks, because long rows take many registers
constexpr int kThreads = kTokens * kWarp;
constexpr int kLayers = 64;  // per launch: their pointers are kernel parameters, which are limited to 4 KiB
constexpr int kFinishThreads = 1024;

template <class T>
struct Layers {
  const T* student[kLayers];
  const T* teacher[kLayers];
  T* grad[kLayers];  // null: not requested
};

struct Sums {
  float dot = 0, student = 0, teacher = 0;
};

template <class T, int N>
__device__ inline void accumulate(Sums& sums, const Pack<T, N>& s, const Pack<T, N>& t) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float a = to_f32(s.v[i]), b = to_f32(t.v[i]);
    sums.dot += a * b;
    sums.student += a * a;
    sums.teacher += b * b;
  }
}

/// 1 - cosine of a token, and the factors of its two rows in the gradient.
struct Cosine {
  float missing, along_s, along_t;
};

/// Combines the lanes' sums over their parts of a row; equal in all lanes.
__device__ inline Cosine cosine_of(const Sums& lane, float scale) {
  const float dot = warp_sum(lane.dot), student = sqrtf(warp_sum(lane.student)), teacher = sqrtf(warp_sum(lane.teacher));
  if (!(student > kLive && teacher > kLive)) return {1.0f, 0.0f, 0.0f};
  const float cosine = dot / (student * teacher);
  return {1.0f - cosine, scale * cosine / (student * student), -scale / (student * teacher)};
}

template <class T, int N>
__device__ inline Pack<T, N> gradient(const Cosine& c, const Pack<T, N>& s, const Pack<T, N>& t) {
  Pack<T, N> out;
#pragma unroll
  for (int i = 0; i < N; ++i) out.v[i] = from_f32<T>(c.along_t * to_f32(t.v[i]) + c.along_s * to_f32(s.v[i]));
  return out;
}

/// Returns 1 - cosine of two rows of `packs`; writes its gradient times `scale`. Lane i has packs i, i + 32, ..., at most Held.
template <int Held, class P>
__device__ inline float held_token(const P* s, const P* t, P* grad, int64_t packs, float scale) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  P a[Held], b[Held];
#pragma unroll
  for (int k = 0; k < Held; ++k) {
    const int at = lane + k * kWarp;
    a[k] = at < packs ? s[at] : P{};
    b[k] = at < packs ? t[at] : P{};
  }
  Sums sums;
#pragma unroll
  for (int k = 0; k < Held; ++k) accumulate(sums, a[k], b[k]);
  const Cosine c = cosine_of(sums, scale);
  if (grad) {
#pragma unroll
    for (int k = 0; k < Held; ++k)
      if (const int at = lane + k * kWarp; at < packs) grad[at] = gradient(c, a[k], b[k]);
  }
  return c.missing;
}

/// The same for rows of any length, read twice.
template <class P>
__device__ inline float long_token(const P* s, const P* t, P* grad, int64_t packs, float scale) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  Sums sums;
#pragma unroll 4
  for (int64_t i = lane; i < packs; i += kWarp) accumulate(sums, s[i], t[i]);
  const Cosine c = cosine_of(sums, scale);
  if (grad) {
#pragma unroll 4
    for (int64_t i = lane; i < packs; i += kWarp) grad[i] = gradient(c, s[i], t[i]);
  }
  return c.missing;
}

/// The tokens of layer blockIdx.y; partial [layers, blocks of tokens]. Packs of N values; Held 0: rows of any length.
template <class T, int N, int Held>
__global__ void __launch_bounds__(kThreads)
    compare(Layers<T> layers, int64_t rows, int64_t tokens, int64_t skip, int64_t width, float scale, float* partial) {
  using P = Pack<T, N>;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t row = int64_t{blockIdx.x} * kTokens + warp, packs = width / N;
  float missing = 0;
  if (row < rows) {
    const P* s = reinterpret_cast<const P*>(layers.student[blockIdx.y] + row * width);
    const P* t = reinterpret_cast<const P*>(layers.teacher[blockIdx.y] + row * width);
    P* grad = layers.grad[blockIdx.y] ? reinterpret_cast<P*>(layers.grad[blockIdx.y] + row * width) : nullptr;
    if (row % tokens >= skip) {
      if constexpr (Held > 0) missing = held_token<Held>(s, t, grad, packs, scale);
      else missing = long_token(s, t, grad, packs, scale);
    } else if (grad) {
      for (int64_t i = lane; i < packs; i += kWarp) grad[i] = P{};
    }
  }
  missing = block_sum(lane == 0 ? missing : 0.0f);
  if (threadIdx.x == 0) partial[int64_t{blockIdx.y} * gridDim.x + blockIdx.x] = missing;
}

/// w_l before normalisation, in double because exp(beta alpha) spans orders of magnitude.
__device__ inline double layer_weight(LayerWeights kind, float beta, const float* alpha, int64_t l, int64_t layers) {
  if (kind == LayerWeights::Uniform) return 1;
  if (kind == LayerWeights::Last) return l + 1 == layers ? 1 : 0;
  return static_cast<double>(l + 1) / static_cast<double>(layers) * exp(static_cast<double>(beta) * static_cast<double>(alpha[l]));
}

/// Runs as a single block: alpha with one warp per layer, then weights and loss with one thread per layer. partial [layers, blocks].
__global__ void __launch_bounds__(kFinishThreads) finish(const float* partial, int64_t blocks, int64_t layers, float scale, float beta,
                                                         LayerWeights kind, float* loss, float* alpha, float* weight) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int64_t l = warp; l < layers; l += kFinishThreads / kWarp) {
    double sum = 0;
#pragma unroll 8
    for (int64_t i = lane; i < blocks; i += kWarp) sum += static_cast<double>(partial[l * blocks + i]);
    sum = warp_sum(sum);
    if (lane == 0) alpha[l] = static_cast<float>(sum * static_cast<double>(scale));
  }
  __syncthreads();
  double total = 0, weighted = 0;
  for (int64_t l = threadIdx.x; l < layers; l += kFinishThreads) total += layer_weight(kind, beta, alpha, l, layers);
  total = block_sum(total);
  for (int64_t l = threadIdx.x; l < layers; l += kFinishThreads) {
    const double w = layer_weight(kind, beta, alpha, l, layers) / total;
    weight[l] = static_cast<float>(w);
    weighted += w * static_cast<double>(alpha[l]);
  }
  weighted = block_sum(weighted);
  if (threadIdx.x == 0) *loss = static_cast<float>(weighted);
}

template <class T>
using Compare = void (*)(Layers<T>, int64_t, int64_t, int64_t, int64_t, float, float*);

/// The kernel with the smallest sufficient number of packs per lane among `Held`.
template <class T, int... Held>
Compare<T> smallest(int64_t packs) {
  Compare<T> kernel = compare<T, kVector<T>, 0>;
  (void)((packs <= Held && (kernel = compare<T, kVector<T>, Held>, true)) || ...);
  return kernel;
}

template <class T>
Compare<T> kernel_for(const DistillationArgs& a) {
  bool vectors = a.width % kVector<T> == 0;
  for (int64_t l = 0; l < a.layers; ++l) vectors = vectors && aligned({a.student[l], a.teacher[l], a.grad ? a.grad[l] : nullptr});
  if (!vectors) return compare<T, 1, 0>;
  const int64_t packs = (a.width / kVector<T> + kWarp - 1) / kWarp;
  if constexpr (std::is_same_v<T, bf16>) return smallest<T, 1, 2, 3, 4, 6, 8>(packs);
  else return smallest<T, 1, 2, 3, 4, 6, 8, 12, 16>(packs);
}

template <class T>
void all_layers(const DistillationArgs& a, float scale, unsigned blocks, float* partial) {
  const Compare<T> kernel = kernel_for<T>(a);
  for (int64_t first = 0; first < a.layers; first += kLayers) {
    const int64_t n = std::min<int64_t>(kLayers, a.layers - first);
    Layers<T> layers = {};
    for (int64_t l = 0; l < n; ++l) {
      layers.student[l] = as<T>(a.student[first + l]);
      layers.teacher[l] = as<T>(a.teacher[first + l]);
      layers.grad[l] = a.grad ? as<T>(a.grad[first + l]) : nullptr;
    }
    launch(kernel, dim3(blocks, static_cast<unsigned>(n)), kThreads, 0, layers, a.batch * a.tokens, a.tokens, a.skip, a.width, scale,
           partial + first * blocks);
  }
}

}  // namespace

void distillation(const DistillationArgs& a) {
  const float scale = 1.0f / static_cast<float>(a.batch * (a.tokens - a.skip));
  const unsigned blocks = blocks_for(a.batch * a.tokens, kTokens);
  const Tensor partial = scratch(DType::Float32, {a.layers, std::max<int64_t>(blocks, 1)});
  dispatch_float(a.dtype, [&]<class T> { all_layers<T>(a, scale, blocks, partial.data<float>()); });
  launch(finish, 1, kFinishThreads, 0, partial.data<float>(), blocks, a.layers, scale, a.beta, a.weights, a.loss, a.alpha, a.weight);
}

}  // namespace uniflow::cuda
