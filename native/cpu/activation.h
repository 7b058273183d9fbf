/// GELU (erf, tanh, quick) and SiLU with their derivatives, on vectors. Included by kernels, once per instruction set.
#pragma once

#include "native/cpu/kernels.h"
#include "native/cpu/simd.h"

namespace uniflow::cpu::UNIFLOW_ISA {

static inline vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

/// erf, absolute error below 1.5e-7 (Abramowitz and Stegun 7.1.26).
static inline vf erf(vf x) {
  const vf a = max(x, -x), t = 1.0f / (1.0f + 0.3275911f * a);
  vf p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const vf r = 1.0f - p * t * exp(-a * a);
  return x < 0.0f ? -r : r;
}

static inline vf tanh(vf x) { return 2.0f * sigmoid(2.0f * x) - 1.0f; }

constexpr float kInverseSqrt2 = 0.70710678118654752f, kInverseSqrt2Pi = 0.39894228040143268f;
constexpr float kTanhScale = 0.79788456080286536f, kTanhCubic = 0.044715f;  // of tanh-GELU
constexpr float kQuick = 1.702f;

static inline vf activate(Activation kind, vf x) {
  switch (kind) {
    case Activation::Gelu: return 0.5f * x * (1.0f + erf(x * kInverseSqrt2));
    case Activation::GeluTanh: return 0.5f * x * (1.0f + tanh(kTanhScale * (x + kTanhCubic * x * x * x)));
    case Activation::QuickGelu: return x * sigmoid(kQuick * x);
    case Activation::Silu: return x * sigmoid(x);
    case Activation::None: break;
  }
  return x;
}

static inline vf activate_derivative(Activation kind, vf x) {
  switch (kind) {
    case Activation::Gelu: return 0.5f * (1.0f + erf(x * kInverseSqrt2)) + x * kInverseSqrt2Pi * exp(-0.5f * x * x);
    case Activation::GeluTanh: {
      const vf t = tanh(kTanhScale * (x + kTanhCubic * x * x * x));
      return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * kTanhScale * (1.0f + 3.0f * kTanhCubic * x * x);
    }
    case Activation::QuickGelu: {
      const vf s = sigmoid(kQuick * x);
      return s + kQuick * x * s * (1.0f - s);
    }
    case Activation::Silu: {
      const vf s = sigmoid(x);
      return s + x * s * (1.0f - s);
    }
    case Activation::None: break;
  }
  return splat(1.0f);
}

}  // namespace uniflow::cpu::UNIFLOW_ISA
