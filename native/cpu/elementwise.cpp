/// Elementwise operations: casts, gated activations, rotary positions, the Euler step. Memory-bound.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <numbers>

#include "native/core/parallel.h"
#include "native/cpu/kernels.h"
#include "native/cpu/simd.h"

namespace uniflow::cpu::UNIFLOW_ISA {
namespace {

vf silu(vf x) { return x / (1.0f + exp(-x)); }

template <class X, class Y>
void cast_as(const void* x, void* out, int64_t n) {
  const X* in = static_cast<const X*>(x);
  Y* o = static_cast<Y*>(out);
  parallel_chunks(n, [&](int64_t begin, int64_t end) {
    for_lanes(end - begin, [&](int64_t i, int lanes) { store_lanes(o + begin + i, load_lanes(in + begin + i, lanes), lanes); });
  });
}

template <class T>
void swiglu_as(const void* x, void* out, int64_t rows, int64_t n) {
  parallel_for(rows, [&](int64_t r) {
    const T* gate = static_cast<const T*>(x) + r * 2 * n;
    T* o = static_cast<T*>(out) + r * n;
    for_lanes(n, [&](int64_t i, int lanes) {
      store_lanes(o + i, silu(load_lanes(gate + i, lanes)) * load_lanes(gate + n + i, lanes), lanes);
    });
  });
}

template <class T>
void silu_sum_as(const float* x, const float* y, int64_t y_stride, void* out, int64_t rows, int64_t n) {
  parallel_for(rows, [&](int64_t r) {
    const float *a = x + r * n, *b = y + r * y_stride;
    T* o = static_cast<T*>(out) + r * n;
    for_lanes(n, [&](int64_t i, int lanes) { store_lanes(o + i, silu(load_lanes(a + i, lanes) + load_lanes(b + i, lanes)), lanes); });
  });
}

/// Rotates one head's vector: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), pairs E/2 apart.
template <class T>
void rotate(const T* in, T* out, const float* cosine, const float* sine, float sign, int64_t half) {
  for_lanes(half, [&](int64_t i, int lanes) {
    const vf a = load_lanes(in + i, lanes), b = load_lanes(in + half + i, lanes);
    store_lanes(out + i, a * load_lanes(cosine + i, lanes) - sign * b * load_lanes(sine + i, lanes), lanes);
    store_lanes(out + half + i, b * load_lanes(cosine + half + i, lanes) + sign * a * load_lanes(sine + half + i, lanes), lanes);
  });
}

template <class T>
void rope_as(const RopeArgs& a) {
  const int64_t width = a.heads * a.head_dim;
  parallel_for(a.batch * a.seq, [&](int64_t r) {
    const T* in = static_cast<const T*>(a.qkv) + r * 3 * width;
    T* out = static_cast<T*>(a.out) + r * 3 * width;
    const int64_t patch = r % a.seq - a.prefix;
    if (patch < 0) {
      std::memcpy(out, in, static_cast<size_t>(3 * width) * sizeof(T));
      return;
    }
    std::memcpy(out + 2 * width, in + 2 * width, static_cast<size_t>(width) * sizeof(T));
    for (int64_t h = 0; h < 2 * a.heads; ++h)  // the heads of q, then those of k
      rotate(in + h * a.head_dim, out + h * a.head_dim, a.cosine + patch * a.head_dim, a.sine + patch * a.head_dim, a.inverse ? -1.0f : 1.0f,
             a.head_dim / 2);
  });
}

}  // namespace

void cast(const void* x, DType from, void* out, DType to, int64_t n) {
  if (from == to) std::memcpy(out, x, static_cast<size_t>(n * size_of(from)));
  else if (from == DType::BFloat16) cast_as<bf16, float>(x, out, n);
  else cast_as<float, bf16>(x, out, n);
}

void swiglu(const void* x, void* out, DType dtype, int64_t rows, int64_t n) {
  dispatch_float(dtype, [&]<class T> { swiglu_as<T>(x, out, rows, n); });
}

void silu_sum(const float* x, const float* y, int64_t y_stride, void* out, DType dtype, int64_t rows, int64_t n) {
  dispatch_float(dtype, [&]<class T> { silu_sum_as<T>(x, y, y_stride, out, rows, n); });
}

void euler(float* x, const float* v, const float* v0, float guidance, float dt, int64_t n) {
  parallel_chunks(n, [&](int64_t begin, int64_t end) {
    for_lanes(end - begin, [&](int64_t i, int lanes) {
      vf velocity = load_lanes(v + begin + i, lanes);
      if (v0) {
        vf free = load_lanes(v0 + begin + i, lanes);
        velocity = free + guidance * (velocity - free);
      }
      store_lanes(x + begin + i, load_lanes(x + begin + i, lanes) + dt * velocity, lanes);
    });
  });
}

int64_t count_non_finite(const float* x, int64_t n) {
  std::atomic<int64_t> total{0};
  parallel_chunks(n, [&](int64_t begin, int64_t end) {
    vi bad = {};  // per-lane counters that count down, because a true comparison is -1
    for_lanes(end - begin, [&](int64_t i, int lanes) { bad += ((vi)load_lanes(x + begin + i, lanes) & 0x7f800000) == 0x7f800000; });
    int64_t found = 0;
    for (int i = 0; i < kWidth; ++i) found -= bad[i];
    total += found;
  });
  return total;
}

void rope(const RopeArgs& a) {
  dispatch_float(a.dtype, [&]<class T> { rope_as<T>(a); });
}

void rope_table(int64_t rows, int64_t cols, int64_t head_dim, float theta, RopeUnit unit, float* out) {
  const int64_t quarter = head_dim / 4, half = rows * cols * head_dim;
  parallel_for(rows * cols, [&](int64_t n) {
    for (int64_t i = 0; i < head_dim; ++i) {
      const int64_t k = i % (2 * quarter), at = k < quarter ? n / cols : n % cols, of = k < quarter ? rows : cols;
      const double centre = 2.0 * (static_cast<double>(at) + 0.5) / static_cast<double>(of) - 1.0;
      const double position = unit == RopeUnit::Patch ? static_cast<double>(at) : 2.0 * std::numbers::pi * centre;
      const double angle = position * std::pow(theta, -4.0 * static_cast<double>(k % quarter) / static_cast<double>(head_dim));
      out[n * head_dim + i] = static_cast<float>(std::cos(angle));
      out[half + n * head_dim + i] = static_cast<float>(std::sin(angle));
    }
  });
}

void copy_rows(void* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t bytes, int64_t rows) {
  parallel_for(rows, [&](int64_t r) {
    char* out = static_cast<char*>(to) + r * to_stride;
    if (from) std::memcpy(out, static_cast<const char*>(from) + r * from_stride, static_cast<size_t>(bytes));
    else std::memset(out, 0, static_cast<size_t>(bytes));
  });
}

void fill(float* out, float value, int64_t n) {
  parallel_chunks(n, [&](int64_t begin, int64_t end) { std::fill(out + begin, out + end, value); });
}

}  // namespace uniflow::cpu::UNIFLOW_ISA
