/// Elementwise operations: casts, gated activations, rotary positions, the Euler step, copies of rows.
///
/// A thread has 16 bytes of the widest operand, or single elements if rows or addresses are not aligned. Memory-bound: every operand is
/// read once and every result written once; the rotary tables are read from memory once per token, and from the caches for its heads.
#include <algorithm>
#include <numbers>
#include <vector>

#include "native/cuda/activation.cuh"
#include "native/cuda/kernels.h"
#include "native/cuda/vectors.cuh"

namespace uniflow::cuda {
namespace {

template <class From, class To>
struct Cast {
  const From* x;
  To* out;

  template <int N>
  __device__ void at(int64_t i) const {
    float v[N];
    load<N>(x + i, v);
    store<N>(out + i, v);
  }
};

/// i indexes the elements of out [rows, n]; x is [rows, 2n].
template <class T>
struct Swiglu {
  const T* x;
  T* out;
  int64_t n;

  template <int N>
  __device__ void at(int64_t i) const {
    const int64_t gate = i + place_of(i, n).row * n;  // in the row's first half
    float g[N], v[N];
    load<N>(x + gate, g);
    load<N>(x + gate + n, v);
#pragma unroll
    for (int k = 0; k < N; ++k) v[k] *= activate<Activation::Silu>(g[k]);
    store<N>(out + i, v);
  }
};

template <class T>
struct SiluSum {
  const float *x, *y;
  int64_t y_stride;
  T* out;
  int64_t n;

  template <int N>
  __device__ void at(int64_t i) const {
    const Place place = place_of(i, n);
    float a[N], b[N];
    load<N>(x + i, a);
    load<N>(y + place.row * y_stride + place.column, b);
#pragma unroll
    for (int k = 0; k < N; ++k) a[k] = activate<Activation::Silu>(a[k] + b[k]);
    store<N>(out + i, a);
  }
};

struct Euler {
  float* x;
  const float *v, *v0;
  float guidance, dt;

  template <int N>
  __device__ void at(int64_t i) const {
    float position[N], velocity[N];
    load<N>(x + i, position);
    load<N>(v + i, velocity);
    if (v0) {
      float free[N];
      load<N>(v0 + i, free);
#pragma unroll
      for (int k = 0; k < N; ++k) velocity[k] = free[k] + guidance * (velocity[k] - free[k]);
    }
#pragma unroll
    for (int k = 0; k < N; ++k) position[k] += dt * velocity[k];
    store<N>(x + i, position);
  }
};

struct Fill {
  float* out;
  float value;

  template <int N>
  __device__ void at(int64_t i) const {
    float v[N];
#pragma unroll
    for (int k = 0; k < N; ++k) v[k] = value;
    store<N>(out + i, v);
  }
};

/// i indexes units of a row's copy; from null: zeros.
template <class Unit>
struct CopyUnits {
  Unit* to;
  const Unit* from;
  int64_t to_stride, from_stride, width;  // units

  template <int N>
  __device__ void at(int64_t i) const {
    const Place place = place_of(i, width);
    to[place.row * to_stride + place.column] = from ? from[place.row * from_stride + place.column] : Unit{};
  }
};

/// Rotates N pairs of one head by N cosines and sines per half.
template <int N, class T>
__device__ void rotate(const T* in, T* out, const float* cosine, const float* sine, float sign, int half) {
  float a[N], b[N], c[N], s[N], turned[N];
  load<N>(in, a);
  load<N>(in + half, b);
  load_values<N>(cosine, c);
  load_values<N>(sine, s);
#pragma unroll
  for (int k = 0; k < N; ++k) turned[k] = a[k] * c[k] - sign * b[k] * s[k];
  load_values<N>(cosine + half, c);
  load_values<N>(sine + half, s);
#pragma unroll
  for (int k = 0; k < N; ++k) b[k] = b[k] * c[k] + sign * a[k] * s[k];
  store<N>(out, turned);
  store<N>(out + half, b);
}

constexpr int kRopeBlock = 256;

/// Block: one token; thread: N elements of the first half of a head and their partners in the second half, for q, k and v in turn.
template <int N, class T>
__global__ void __launch_bounds__(kRopeBlock) rope_kernel(RopeArgs a) {
  const int64_t token = blockIdx.x, width = a.heads * a.head_dim, patch = token % a.seq - a.prefix;
  const T* in = static_cast<const T*>(a.qkv) + token * 3 * width;
  T* out = static_cast<T*>(a.out) + token * 3 * width;
  const int half = static_cast<int>(a.head_dim) / 2, vectors = half / N, heads = static_cast<int>(a.heads);
  for (int i = static_cast<int>(threadIdx.x); i < 3 * heads * vectors; i += static_cast<int>(blockDim.x)) {
    const int head = i / vectors, pair = i % vectors * N;
    const int64_t at = head * a.head_dim + pair;
    if (patch >= 0 && head < 2 * heads) {
      const int64_t angle = patch * a.head_dim + pair;
      rotate<N>(in + at, out + at, a.cosine + angle, a.sine + angle, a.inverse ? -1.0f : 1.0f, half);
    } else {
      *reinterpret_cast<Pack<T, N>*>(out + at) = *reinterpret_cast<const Pack<T, N>*>(in + at);
      *reinterpret_cast<Pack<T, N>*>(out + at + half) = *reinterpret_cast<const Pack<T, N>*>(in + at + half);
    }
  }
}

template <int N, class T>
void rope_by(const RopeArgs& a) {
  const int64_t vectors = 3 * a.heads * (a.head_dim / 2 / N);
  if (vectors == 0) return;
  launch(rope_kernel<N, T>, blocks_for(a.batch * a.seq, 1), static_cast<unsigned>(std::min<int64_t>(kRopeBlock, vectors)), 0, a);
}

template <class T>
void rope_as(const RopeArgs& a) {
  if (aligned({a.qkv, a.out, a.cosine, a.sine}) && a.head_dim / 2 % kVector<T> == 0) rope_by<kVector<T>, T>(a);
  else rope_by<1, T>(a);
}

/// Angles in double, as on the CPU; a table is computed only once per grid.
__global__ void rope_table_kernel(int64_t rows, int64_t cols, int64_t head_dim, float theta, RopeUnit unit, float* out) {
  const int64_t half = rows * cols * head_dim, at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (at >= half) return;
  const int64_t n = at / head_dim, quarter = head_dim / 4, k = at % head_dim % (2 * quarter);
  const int64_t place = k < quarter ? n / cols : n % cols, of = k < quarter ? rows : cols;
  const double power = -4.0 * static_cast<double>(k % quarter) / static_cast<double>(head_dim);
  const double centre = 2.0 * (static_cast<double>(place) + 0.5) / static_cast<double>(of) - 1.0;
  const double position = unit == RopeUnit::Patch ? static_cast<double>(place) : 2.0 * std::numbers::pi * centre;
  const double angle = position * pow(static_cast<double>(theta), power);
  out[at] = static_cast<float>(cos(angle));
  out[half + at] = static_cast<float>(sin(angle));
}

constexpr int kCountBlock = 256;

/// found[block] = number of NaN or infinite elements among those of the block's threads.
__global__ void __launch_bounds__(kCountBlock) count_non_finite_kernel(const float* x, int64_t n, int32_t* found) {
  int32_t bad = 0;
#pragma unroll 4
  for (int64_t i = int64_t{blockIdx.x} * kCountBlock + threadIdx.x; i < n; i += int64_t{gridDim.x} * kCountBlock)
    bad += (__float_as_uint(x[i]) & 0x7f800000u) == 0x7f800000u;
  bad = block_sum(bad);
  if (threadIdx.x == 0) found[blockIdx.x] = bad;
}

template <class T>
void swiglu_as(const void* x, void* out, int64_t rows, int64_t n) {
  each<kVector<T>>(Swiglu<T>{as<T>(x), as<T>(out), n}, rows * n, aligned({x, out}) && n % kVector<T> == 0);
}

template <class Unit>
void copy_units(void* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t bytes, int64_t rows) {
  constexpr int64_t size = sizeof(Unit);
  each<1>(CopyUnits<Unit>{as<Unit>(to), as<Unit>(from), to_stride / size, from_stride / size, bytes / size}, rows * (bytes / size), false);
}

void copy(void* to, const void* from, int64_t bytes) {
  check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, stream()), "cudaMemcpyAsync");
}

/// A point in time on the stream.
class Event {
 public:
  Event() { check(cudaEventCreate(&event_), "cudaEventCreate"); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  void record() const { check(cudaEventRecord(event_, stream()), "cudaEventRecord"); }
  /// Seconds from `begin` to this event; waits until the stream has reached it.
  double since(const Event& begin) const {
    float milliseconds = 0;
    check(cudaEventSynchronize(event_), "cudaEventSynchronize");
    check(cudaEventElapsedTime(&milliseconds, begin.event_, event_), "cudaEventElapsedTime");
    return double{milliseconds} / 1000;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

}  // namespace

void cast(const void* x, DType from, void* out, DType to, int64_t n) {
  constexpr int N = kVectorOf<float, bf16>;
  if (from == to) copy(out, x, n * size_of(from));
  else if (from == DType::BFloat16) each<N>(Cast<bf16, float>{as<bf16>(x), as<float>(out)}, n, aligned({x, out}));
  else each<N>(Cast<float, bf16>{as<float>(x), as<bf16>(out)}, n, aligned({x, out}));
}

void swiglu(const void* x, void* out, DType dtype, int64_t rows, int64_t n) {
  dispatch_float(dtype, [&]<class T> { swiglu_as<T>(x, out, rows, n); });
}

void silu_sum(const float* x, const float* y, int64_t y_stride, void* out, DType dtype, int64_t rows, int64_t n) {
  constexpr int N = kVector<float>;
  const bool vectors = aligned({x, y, out}) && n % N == 0 && y_stride % N == 0;
  dispatch_float(dtype, [&]<class T> { each<N>(SiluSum<T>{x, y, y_stride, as<T>(out), n}, rows * n, vectors); });
}

void euler(float* x, const float* v, const float* v0, float guidance, float dt, int64_t n) {
  each<kVector<float>>(Euler{x, v, v0, guidance, dt}, n, aligned({x, v, v0}));
}

void rope(const RopeArgs& a) {
  dispatch_float(a.dtype, [&]<class T> { rope_as<T>(a); });
}

void rope_table(int64_t rows, int64_t cols, int64_t head_dim, float theta, RopeUnit unit, float* out) {
  constexpr unsigned kBlock = 128;
  launch(rope_table_kernel, blocks_for(rows * cols * head_dim, kBlock), kBlock, 0, rows, cols, head_dim, theta, unit, out);
}

int64_t count_non_finite(const float* x, int64_t n) {
  constexpr int64_t kBlocks = 1024, kPerBlock = 4 * kCountBlock;
  const unsigned blocks = blocks_for(std::min(n, kBlocks * kPerBlock), kPerBlock);
  if (blocks == 0) return 0;
  const Tensor found = scratch(DType::Int32, {blocks});
  launch(count_non_finite_kernel, blocks, kCountBlock, 0, x, n, found.data<int32_t>());
  std::vector<int32_t> counts(blocks);
  to_host(counts.data(), found.data(), found.bytes());
  int64_t total = 0;
  for (const int32_t count : counts) total += count;
  return total;
}

/// Contiguous rows are a single copy. Others are copied by a kernel, in the largest unit that divides everything: CUDA's own 2D copy does
/// not support a stride of 0, below the bytes of a row, or above its maximal pitch.
void copy_rows(void* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t bytes, int64_t rows) {
  if (bytes <= 0 || rows <= 0) return;
  if (!from) from_stride = bytes;
  if (rows == 1 || (to_stride == bytes && from_stride == bytes)) {
    if (from) copy(to, from, bytes * rows);
    else check(cudaMemsetAsync(to, 0, static_cast<size_t>(bytes * rows), stream()), "cudaMemsetAsync");
    return;
  }
  const auto addresses = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
  const auto all = addresses | static_cast<uintptr_t>(to_stride | from_stride | bytes);
  if (all % 16 == 0) copy_units<uint4>(to, to_stride, from, from_stride, bytes, rows);
  else if (all % 4 == 0) copy_units<uint32_t>(to, to_stride, from, from_stride, bytes, rows);
  else if (all % 2 == 0) copy_units<uint16_t>(to, to_stride, from, from_stride, bytes, rows);
  else copy_units<uint8_t>(to, to_stride, from, from_stride, bytes, rows);
}

void fill(float* out, float value, int64_t n) { each<kVector<float>>(Fill{out, value}, n, aligned({out})); }

double copy_rate(void* to, const void* from, int64_t bytes) {
  constexpr int kCopies = 100;  // the median of these, as rows of a benchmark are timed
  const Event begin, end;
  std::vector<double> seconds;
  for (int i = 0; i < kCopies; ++i) {
    begin.record();
    copy(to, from, bytes);
    end.record();
    seconds.push_back(end.since(begin));
  }
  std::ranges::nth_element(seconds, seconds.begin() + kCopies / 2);
  return 2.0 * static_cast<double>(bytes) / seconds[kCopies / 2];
}

}  // namespace uniflow::cuda
