/// AdamW over all tensors in one launch, with moving average and bfloat16 copy, and the gradients' norm.
///
/// adamw, global_norm: a block has one chunk of one tensor. Each call uploads the list of tensors and the running count of their chunks: 76
/// bytes per tensor for adamw, 20 for global_norm, built on the host in one pass over the list. All threads of a block find its tensor
/// together, by counting the tensors that end before it. Roofline bound of adamw: parameter, m, v read and written, gradient read: 28 bytes
/// per parameter (+ 8 for the average, + 2 for the copy); of global_norm: gradients read.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "native/cuda/chunks.cuh"
#include "native/cuda/kernels.h"

namespace uniflow::cuda {
namespace {

constexpr int64_t kChunk = 1 << 14;  // elements per chunk in a list: several waves of blocks over the parameters of a small model

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
  for (int64_t first = 0; first < count; first += kChunkThreads) {
    const int64_t i = first + threadIdx.x;
    item += __syncthreads_count(i < count && ends[i] <= blockIdx.x);
  }
  const int64_t begin = (blockIdx.x - (item > 0 ? ends[item - 1] : 0)) * kChunk, n = items[item].n;
  return {item, begin, begin + kChunk < n ? begin + kChunk : n};
}

__global__ void __launch_bounds__(kFinishThreads) root_of_sum(const double* partial, int64_t count, float* out) {
  const double total = sum_of(partial, count);
  if (threadIdx.x == 0) *out = static_cast<float>(sqrt(total));
}

struct Gradient {
  const float* x;
  int64_t n;
};

__global__ void __launch_bounds__(kChunkThreads) sum_of_squares(const Gradient* items, const uint32_t* ends, int64_t count, double* partial) {
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

__global__ void __launch_bounds__(kChunkThreads) update_all(const AdamWParameter* items, const uint32_t* ends, int64_t count, AdamWArgs a) {
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
    launch(sum_of_squares, chunks, kChunkThreads, 0, list.items(), list.ends(), list.count, partial.data<double>());
  }
  launch(root_of_sum, 1, kFinishThreads, 0, partial.data<double>(), chunks, out);
}

void adamw(const AdamWArgs& a) {
  if (a.count == 0) return;
  const auto list = list_of(a.parameters, a.count);
  launch(update_all, list.chunks, kChunkThreads, 0, list.items(), list.ends(), list.count, a);
}

}  // namespace uniflow::cuda
