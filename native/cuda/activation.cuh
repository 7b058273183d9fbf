/// GELU (erf, tanh, quick) and SiLU with their derivatives, matching native/cpu/activation.h.
///
/// sigmoid costs one exponential and one quotient on the special function units. Its relative error is a few parts in 10^7 near zero and in
/// 10^6 far on the negative side, where it hardly matters. silu(-inf) is NaN, as in PyTorch.
#pragma once

#include <type_traits>

#include "native/core/activation.h"
#include "native/cuda/device.cuh"

namespace uniflow::cuda {

/// Calls body(std::integral_constant<Activation, kind>{}), to turn a runtime kind into a template argument.
template <class Body>
void with_activation(Activation kind, Body&& body) {
  switch (kind) {
    case Activation::Gelu: return body(std::integral_constant<Activation, Activation::Gelu>{});
    case Activation::GeluTanh: return body(std::integral_constant<Activation, Activation::GeluTanh>{});
    case Activation::QuickGelu: return body(std::integral_constant<Activation, Activation::QuickGelu>{});
    case Activation::Silu: return body(std::integral_constant<Activation, Activation::Silu>{});
    case Activation::None: return body(std::integral_constant<Activation, Activation::None>{});
  }
}

constexpr float kInverseSqrt2 = 0.70710678118654752f, kInverseSqrt2Pi = 0.39894228040143268f;
constexpr float kTanhScale = 0.79788456080286536f, kTanhCubic = 0.044715f;  // for tanh-GELU
constexpr float kTanhFlat = 16;                                           // its derivative is 0 or 1 from there on
constexpr float kQuick = 1.702f;

__device__ inline float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

/// The tanh of tanh-GELU, computed as a sigmoid. Near 0 only its absolute error matters, because 1 is added to it.
__device__ inline float gelu_tanh(float x) { return 2.0f * sigmoid(2.0f * kTanhScale * (x + kTanhCubic * x * x * x)) - 1.0f; }

/// Of the standard normal distribution.
struct NormalAt {
  float below, density;  // P(X <= x), and its derivative

  /// Without branches: 7.1.26 of Abramowitz and Stegun, "Handbook of Mathematical Functions" (1964), for the smaller tail, so that
  /// nothing cancels far on the negative side. The absolute error is below 4e-7. Both results share one exponential.
  __device__ explicit NormalAt(float x) {
    constexpr float kP = 0.3275911f, kA[] = {1.061405429f, -1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f};
    const float wave = __expf(-0.5f * x * x), t = __fdividef(1.0f, 1.0f + kP * kInverseSqrt2 * fabsf(x));
    float p = kA[0];
#pragma unroll
    for (int i = 1; i < 5; ++i) p = p * t + kA[i];
    const float tail = 0.5f * p * t * wave;
    below = x < 0 ? tail : 1.0f - tail;
    density = kInverseSqrt2Pi * wave;
  }
};

template <Activation K>
__device__ inline float activate(float x) {
  if constexpr (K == Activation::Gelu) return x * NormalAt(x).below;
  else if constexpr (K == Activation::GeluTanh) return 0.5f * x * (1.0f + gelu_tanh(x));
  else if constexpr (K == Activation::QuickGelu) return x * sigmoid(kQuick * x);
  else if constexpr (K == Activation::Silu) return x * sigmoid(x);
  else return x;
}

template <Activation K>
__device__ inline float activate_derivative(float x) {
  if constexpr (K == Activation::Gelu) {
    const NormalAt n(x);
    return n.below + x * n.density;
  } else if constexpr (K == Activation::GeluTanh) {
    x = x > kTanhFlat ? kTanhFlat : x < -kTanhFlat ? -kTanhFlat : x;  // x * x must not overflow; NaN stays
    const float t = gelu_tanh(x);
    return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * kTanhScale * (1.0f + 3.0f * kTanhCubic * x * x);
  } else if constexpr (K == Activation::QuickGelu) {
    const float s = sigmoid(kQuick * x);
    return s + x * s * (1.0f - s) * kQuick;  // in this order: kQuick * x may overflow
  } else if constexpr (K == Activation::Silu) {
    const float s = sigmoid(x);
    return s + x * s * (1.0f - s);
  } else {
    return 1.0f;
  }
}

/// The activation of a kind that is the same in all threads.
__device__ inline float activate(Activation kind, float x) {
  switch (kind) {
    case Activation::Gelu: return activate<Activation::Gelu>(x);
    case Activation::GeluTanh: return activate<Activation::GeluTanh>(x);
    case Activation::QuickGelu: return activate<Activation::QuickGelu>(x);
    case Activation::Silu: return activate<Activation::Silu>(x);
    case Activation::None: break;
  }
  return x;
}

}  // namespace uniflow::cuda
