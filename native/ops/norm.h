/// LayerNorm and RMSNorm over the last dimension, optionally modulated (AdaLN):
/// out = norm(x) * weight + bias, then out * (1 + scale) + shift. Bytes: x once, out once.
#pragma once

#include "native/ops/linear.h"

namespace uniflow::ops {

struct NormOptions {
  Tensor weight, bias;  // [D] float32, empty if absent
  Tensor scale, shift;  // with the shape and dtype of x; both or none
  float eps = 1e-6f;
  bool rms = false;
};

struct NormGradients {
  Tensor x;
  Tensor weight, bias;  // [D] float32, if present
  Tensor scale, shift;  // as x, if modulated
};

/// Gradients of norm() at x; recomputes its statistics.
NormGradients norm_backward(const SessionRef& session, const Tensor& x, const Tensor& d_out, const NormOptions& options);

Tensor norm(const SessionRef& session, const Tensor& x, const NormOptions& options);

}  // namespace uniflow::ops
