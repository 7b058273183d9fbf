/// GELU (erf, tanh, quick) and SiLU with their derivatives, on vectors. Included by kernels, once per instruction set.
#pragma once

#include <iterator>

#include "native/cpu/kernels.h"
#include "native/cpu/simd.h"

namespace uniflow::cpu::UNIFLOW_ISA {

static inline vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

/// erf, relative error below 4e-7: x P(x^2) / Q(x^2), a minimax fit on |x| <= 3.92, where erf rounds to 1. NaN stays NaN.
static inline vf erf(vf x) {
  constexpr float kP[] = {1.9924227601109123e-8f, -1.9578451428969856e-6f, 1.4185254985932261e-4f, 3.7016912829130888e-3f,
                          5.0573583692312241e-2f, 1.9992639124393463e-1f, 1.1283791065216064f};
  constexpr float kQ[] = {9.560593171045184e-4f, 1.4353368431329727e-2f, 1.1499918997287750e-1f, 5.1051181554794312e-1f, 1.0f};
  x = max(splat(-3.92f), min(splat(3.92f), x));
  const vf u = x * x;
  vf p = splat(kP[0]), q = splat(kQ[0]);
  for (size_t i = 1; i < std::size(kP); ++i) p = p * u + kP[i];
  for (size_t i = 1; i < std::size(kQ); ++i) q = q * u + kQ[i];
  return max(splat(-1.0f), min(splat(1.0f), x * p / q));
}

static inline vf tanh(vf x) { return 2.0f * sigmoid(2.0f * x) - 1.0f; }

constexpr float kInverseSqrt2 = 0.70710678118654752f, kInverseSqrt2Pi = 0.39894228040143268f;
constexpr float kTanhScale = 0.79788456080286536f, kTanhCubic = 0.044715f;  // for tanh-GELU
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
