/// Finite scalar quantisation and its codes. A thread has 16 bytes of latents, or one code. Memory-bound: every operand is read once and
/// every result written once.
#include "native/cuda/kernels.h"
#include "native/cuda/vectors.cuh"

namespace uniflow::cuda {
namespace {

template <class T>
struct Fsq {
  Levels levels;
  const T* x;
  T* out;

  template <int N>
  __device__ void at(int64_t i) const {
    float v[N];
    load<N>(x + i, v);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const Level& l = levels.channel[place_of(i + k, levels.count).column];
      v[k] = (rintf(l.range * tanhf(v[k] + l.shift) - l.offset) + 0.0f) / static_cast<float>(l.half);  // never -0, which no code has
    }
    store<N>(out + i, v);
  }
};

template <class T>
struct FsqBackward {
  Levels levels;
  const T *x, *d_out;
  T* d_x;

  template <int N>
  __device__ void at(int64_t i) const {
    float v[N], d[N];
    load<N>(x + i, v);
    load<N>(d_out + i, d);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const Level& l = levels.channel[place_of(i + k, levels.count).column];
      const float t = tanhf(v[k] + l.shift);
      d[k] *= l.range * (1 - t * t) / static_cast<float>(l.half);
    }
    store<N>(d_x + i, d);
  }
};

/// g indexes the codes.
template <class T>
struct LatentsToCodes {
  Levels levels;
  const T* latents;
  int32_t* codes;

  template <int N>
  __device__ void at(int64_t g) const {
    static_assert(N == 1);
    int32_t code = 0;
    for (int32_t c = 0; c < levels.count; ++c) {
      const Level& l = levels.channel[c];
      const float digit = rintf(to_f32(latents[g * levels.count + c]) * static_cast<float>(l.half)) + static_cast<float>(l.half);
      code += __float2int_rz(fminf(fmaxf(digit, 0.0f), static_cast<float>(l.level - 1))) * l.radix;  // NaN becomes 0
    }
    codes[g] = code;
  }
};

/// g indexes the codes.
struct CodesToLatents {
  Levels levels;
  const int32_t* codes;
  float* latents;
  unsigned* outside;

  template <int N>
  __device__ void at(int64_t g) const {
    static_assert(N == 1);
    const int32_t code = codes[g];
    if (code < 0 || code >= levels.codes) atomicAdd(outside, 1u);
    for (int32_t c = 0; c < levels.count; ++c) {
      const Level& l = levels.channel[c];
      latents[g * levels.count + c] = static_cast<float>(code / l.radix % l.level - l.half) / static_cast<float>(l.half);
    }
  }
};

}  // namespace

void fsq(const Levels& levels, const void* x, void* out, DType dtype, int64_t n) {
  dispatch_float(dtype, [&]<class T> { each<kVector<T>>(Fsq<T>{levels, as<T>(x), as<T>(out)}, n, aligned({x, out})); });
}

void fsq_backward(const Levels& levels, const void* x, const void* d_out, void* d_x, DType dtype, int64_t n) {
  dispatch_float(dtype, [&]<class T> {
    each<kVector<T>>(FsqBackward<T>{levels, as<T>(x), as<T>(d_out), as<T>(d_x)}, n, aligned({x, d_out, d_x}));
  });
}

void latents_to_codes(const Levels& levels, const void* latents, int32_t* codes, DType dtype, int64_t groups) {
  dispatch_float(dtype, [&]<class T> { each<1>(LatentsToCodes<T>{levels, as<T>(latents), codes}, groups, false); });
}

int64_t codes_to_latents(const Levels& levels, const int32_t* codes, float* latents, int64_t groups) {
  const Tensor outside = scratch(DType::Int32, {1});
  check(cudaMemsetAsync(outside.data(), 0, static_cast<size_t>(outside.bytes()), stream()), "cudaMemsetAsync");
  each<1>(CodesToLatents{levels, codes, latents, outside.data<unsigned>()}, groups, false);
  unsigned count = 0;
  to_host(&count, outside.data(), sizeof count);
  return count;
}

}  // namespace uniflow::cuda
