/// AdamW over all tensors in one launch, with moving average and bfloat16 copy, and the reductions around it.
///
/// adamw, global_norm: a block has one chunk of one tensor. Each call uploads the list of tensors and the running count of their chunks: 76
/// bytes per tensor for adamw, 20 for global_norm, built on the host in one pass over the list. All threads of a block find its tensor
/// together, by counting the tensors that end before it. Roofline bound of adamw: parameter, m, v read and written, gradient read: 28 bytes
/// per parameter (+ 8 for the average, + 2 for the copy); of global_norm: gradients read.
/// mean_squared_error, interpolate: a block has a range of the elements. Roofline bound: both inputs read, the outputs written.
/// Sums are float32 within a thread and float64 from there on, in an order that depends only on the sizes.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "native/cuda/kernels.h"
#include "native/cuda/vectors.cuh"

namespace uniflow::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kFinishThreads = 1024;
constexpr int64_t kChunk = 1 << 14;       // elements per chunk in a list: several waves of blocks over the parameters of a small model
constexpr int64_t kErrorChunk = 1 << 12;  // for mean_squared_error, whose arrays are smaller
constexpr int kLanes = kVector<float>;

__device__ inline bool on_16_bytes(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// --- lists of tensors ------------------------------------------------------------------------------------------

/// Items with a size `n` on the device, and ends[i], the number of chunks in items 0 to i.
template <class Item>
struct List {
  Tensor memory;  // items, then ends
  int64_t count;
  unsigned chunks;

  const Item* items() const { return memory.data<Item>(); }
  const uint32_t* ends() const { return reinterpret_cast<const uint32_t*>(items() + count); }
};

template <class Item>
List<Item> list_of(const Item* items, int64_t count) {
  const size_t item_bytes = static_cast<size_t>(count) * sizeof(Item);
  std::vector<std::byte> bytes(item_bytes + static_cast<size_t>(count) * sizeof(uint32_t));
  std::memcpy(bytes.data(), items, item_bytes);
  uint32_t chunks = 0;
  for (int64_t i = 0; i < count; ++i) {
    chunks += blocks_for(items[i].n, kChunk);
    std::memcpy(bytes.data() + item_bytes + static_cast<size_t>(i) * sizeof chunks, &chunks, sizeof chunks);
  }
  return {to_device(bytes.data(), static_cast<int64_t>(bytes.size())), count, chunks};
}

struct Chunk {
  int64_t item, begin, end;
};

/// Finds this block's chunk. All threads call it.
template <class Item>
__device__ inline Chunk chunk_of_block(const Item* items, const uint32_t* ends, int64_t count) {
  int64_t item = 0;
  for (int64_t first = 0; first < count; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    item += __syncthreads_count(i < count && ends[i] <= blockIdx.x);
  }
  const int64_t begin = (blockIdx.x - (item > 0 ? ends[item - 1] : 0)) * kChunk, n = items[item].n;
  return {item, begin, begin + kChunk < n ? begin + kChunk : n};
}

/// Calls body(i, width) for all of [begin, end): 4 at a time if `vectors`, then one at a time. `begin` is a multiple of 4. Unroll: bodies
/// that only read have that many reads in flight.
template <int Unroll, class Body>
__device__ inline void for_elements(int64_t begin, int64_t end, bool vectors, Body&& body) {
  const int64_t split = vectors ? end - (end - begin) % kLanes : begin;
#pragma unroll Unroll
  for (int64_t i = begin + threadIdx.x * kLanes; i < split; i += kThreads * kLanes) body(i, std::integral_constant<int, kLanes>{});
  for (int64_t i = split + threadIdx.x; i < end; i += kThreads) body(i, std::integral_constant<int, 1>{});
}

// --- sums ------------------------------------------------------------------------------------------------------

/// The sum of `count` numbers, returned in all threads of the single block.
__device__ inline double sum_of(const double* partial, int64_t count) {
  double total = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < count; i += kFinishThreads) total += partial[i];
  return block_sum(total);
}

__global__ void __launch_bounds__(kFinishThreads) root_of_sum(const double* partial, int64_t count, float* out) {
  const double total = sum_of(partial, count);
  if (threadIdx.x == 0) *out = static_cast<float>(sqrt(total));
}

__global__ void __launch_bounds__(kFinishThreads) mean_of_sum(const double* partial, int64_t count, int64_t n, float* out) {
  const double total = sum_of(partial, count);
  if (threadIdx.x == 0) *out = static_cast<float>(total / static_cast<double>(n));
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

struct Gradient {
  const float* x;
  int64_t n;
};

__global__ void __launch_bounds__(kThreads) sum_of_squares(const Gradient* items, const uint32_t* ends, int64_t count, double* partial) {
  const Chunk chunk = chunk_of_block(items, ends, count);
  const float* x = items[chunk.item].x;
  Squares squares;
  for_elements<4>(chunk.begin, chunk.end, on_16_bytes(x), [&](int64_t i, auto width) {
    float v[width()];
    load(x + i, v);
    squares.add(v);
  });
  const double total = block_sum(squares.total());
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kThreads)
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

Tensor partial_sums(int64_t blocks) { return scratch(DType::UInt8, {std::max<int64_t>(blocks, 1) * static_cast<int64_t>(sizeof(double))}); }

// --- AdamW -----------------------------------------------------------------------------------------------------

/// The step's factors for one tensor.
struct Factors {
  float grad_scale, step, root, decay;
};

/// Updates N values from i on.
template <int N>
__device__ inline void update(const AdamWArgs& a, const AdamWParameter& p, const Factors& f, int64_t i) {
  float g[N], m[N], v[N], value[N], average[N];
  load(p.grad + i, g);
  load(p.m + i, m);
  load(p.v + i, v);
  load(p.parameter + i, value);
  if (p.average) load(p.average + i, average);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const float scaled = f.grad_scale * g[k];
    m[k] = a.beta1 * m[k] + (1.0f - a.beta1) * scaled;
    v[k] = a.beta2 * v[k] + (1.0f - a.beta2) * scaled * scaled;
    value[k] = f.decay * value[k] - f.step * m[k] / (f.root * sqrtf(v[k]) + a.eps);
  }
  store(p.m + i, m);
  store(p.v + i, v);
  store(p.parameter + i, value);
  if (p.compute) store(static_cast<bf16*>(p.compute) + i, value);
  if (!p.average) return;
#pragma unroll
  for (int k = 0; k < N; ++k) average[k] = a.ema * average[k] + (1.0f - a.ema) * value[k];
  store(p.average + i, average);
}

__global__ void __launch_bounds__(kThreads) update_all(const AdamWParameter* items, const uint32_t* ends, int64_t count, AdamWArgs a) {
  const float norm = *a.norm;
  if (!std::isfinite(norm)) return;
  const Chunk chunk = chunk_of_block(items, ends, count);
  const AdamWParameter p = items[chunk.item];
  const Factors f = {.grad_scale = a.clip > 0 && norm > a.clip ? a.clip / (norm + 1e-6f) : 1.0f,
                     .step = p.lr / a.correction1,
                     .root = 1.0f / sqrtf(a.correction2),
                     .decay = 1.0f - p.lr * p.weight_decay};
  const bool vectors = on_16_bytes(p.parameter) && on_16_bytes(p.grad) && on_16_bytes(p.m) && on_16_bytes(p.v) && on_16_bytes(p.average) &&
                       reinterpret_cast<uintptr_t>(p.compute) % (kLanes * sizeof(bf16)) == 0;
  for_elements<1>(chunk.begin, chunk.end, vectors, [&](int64_t i, auto width) { update<width()>(a, p, f, i); });
}

// --- interpolate -----------------------------------------------------------------------------------------------

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

void global_norm(const float* const* x, const int64_t* n, int64_t count, float* out) {
  std::vector<Gradient> items;
  for (int64_t i = 0; i < count; ++i) items.push_back({x[i], n[i]});
  Tensor partial = partial_sums(0);
  unsigned chunks = 0;
  if (count > 0) {
    const auto list = list_of(items.data(), count);
    chunks = list.chunks;
    partial = partial_sums(chunks);
    launch(sum_of_squares, chunks, kThreads, 0, list.items(), list.ends(), list.count, partial.data<double>());
  }
  launch(root_of_sum, 1, kFinishThreads, 0, partial.data<double>(), chunks, out);
}

void adamw(const AdamWArgs& a) {
  if (a.count == 0) return;
  const auto list = list_of(a.parameters, a.count);
  launch(update_all, list.chunks, kThreads, 0, list.items(), list.ends(), list.count, a);
}

void mean_squared_error(const float* v, const float* target, float* grad, float* loss, int64_t n) {
  const unsigned blocks = blocks_for(n, kErrorChunk);
  const Tensor partial = partial_sums(blocks);
  launch(squared_error, blocks, kThreads, 0, v, target, grad, 2.0f / static_cast<float>(n), n, aligned({v, target, grad}),
         partial.data<double>());
  launch(mean_of_sum, 1, kFinishThreads, 0, partial.data<double>(), blocks, n, loss);
}

void interpolate(const float* data, const float* noise, const float* t, float* noisy, float* target, int64_t rows, int64_t width) {
  const bool vectors = width % kLanes == 0 && aligned({data, noise, noisy, target});
  each<kLanes>(Interpolate{data, noise, t, noisy, target, width}, rows * width, vectors);
}

}  // namespace uniflow::cuda
