/// Finite scalar quantisation and its codes. Bound by the hyperbolic tangent of every latent, of which a token has few.
#include <algorithm>
#include <atomic>
#include <cmath>

#include "native/core/parallel.h"
#include "native/cpu/kernels.h"

namespace uniflow::cpu::UNIFLOW_ISA {
namespace {

void put(float* p, float v) { *p = v; }
void put(bf16* p, float v) { *p = to_bf16(v); }

/// Calls body(i, level) for all elements i of `groups` groups.
template <class Body>
void each_element(const Levels& levels, int64_t groups, Body&& body) {
  parallel_chunks(groups, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g)
      for (int32_t c = 0; c < levels.count; ++c) body(g * levels.count + c, levels.channel[c]);
  });
}

template <class T>
void fsq_as(const Levels& levels, const T* x, T* out, int64_t groups) {
  each_element(levels, groups, [=](int64_t i, const Level& l) {
    const float digit = std::nearbyint(l.range * std::tanh(to_float(x[i]) + l.shift) - l.offset) + 0.0f;  // never -0, which no code has
    put(out + i, digit / static_cast<float>(l.half));
  });
}

template <class T>
void fsq_backward_as(const Levels& levels, const T* x, const T* d_out, T* d_x, int64_t groups) {
  each_element(levels, groups, [=](int64_t i, const Level& l) {
    const float t = std::tanh(to_float(x[i]) + l.shift);
    put(d_x + i, to_float(d_out[i]) * (l.range * (1 - t * t) / static_cast<float>(l.half)));
  });
}

template <class T>
int32_t code_of(const Levels& levels, const T* latents) {
  int32_t code = 0;
  for (int32_t c = 0; c < levels.count; ++c) {
    const Level& l = levels.channel[c];
    const float digit = std::nearbyint(to_float(latents[c]) * static_cast<float>(l.half)) + static_cast<float>(l.half);
    code += static_cast<int32_t>(std::fmin(std::fmax(digit, 0.0f), static_cast<float>(l.level - 1))) * l.radix;  // NaN becomes 0
  }
  return code;
}

}  // namespace

void fsq(const Levels& levels, const void* x, void* out, DType dtype, int64_t n) {
  dispatch_float(dtype, [&]<class T> { fsq_as(levels, static_cast<const T*>(x), static_cast<T*>(out), n / levels.count); });
}

void fsq_backward(const Levels& levels, const void* x, const void* d_out, void* d_x, DType dtype, int64_t n) {
  dispatch_float(dtype, [&]<class T> {
    fsq_backward_as(levels, static_cast<const T*>(x), static_cast<const T*>(d_out), static_cast<T*>(d_x), n / levels.count);
  });
}

void latents_to_codes(const Levels& levels, const void* latents, int32_t* codes, DType dtype, int64_t groups) {
  dispatch_float(dtype, [&]<class T> {
    parallel_chunks(groups, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) codes[g] = code_of(levels, static_cast<const T*>(latents) + g * levels.count);
    });
  });
}

int64_t codes_to_latents(const Levels& levels, const int32_t* codes, float* latents, int64_t groups) {
  std::atomic<int64_t> outside{0};
  parallel_chunks(groups, [&](int64_t begin, int64_t end) {
    outside += std::count_if(codes + begin, codes + end, [&](int32_t code) { return code < 0 || code >= levels.codes; });
  });
  each_element(levels, groups, [=](int64_t i, const Level& l) {
    const int32_t digit = codes[i / levels.count] / l.radix % l.level - l.half;
    latents[i] = static_cast<float>(digit) / static_cast<float>(l.half);
  });
  return outside;
}

}  // namespace uniflow::cpu::UNIFLOW_ISA
