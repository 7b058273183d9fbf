/// Activations on their own, and how a branch joins its residual, with backward passes: what training uses where
/// inference fuses them into linear(). Bytes: every operand once.
#pragma once

#include "native/ops/linear.h"

namespace uniflow::ops {

Tensor activation(const SessionRef& session, const Tensor& x, Activation kind);
/// d_x from the activation's input.
Tensor activation_backward(const SessionRef& session, const Tensor& x, const Tensor& d_out, Activation kind);

/// residual + scale * branch (LayerScale [D]) or residual + gate * branch (AdaLN, shaped as branch); either may be empty.
Tensor scale_add(const SessionRef& session, const Tensor& residual, const Tensor& branch, const Tensor& scale, const Tensor& gate);

struct ScaleAddGradients {
  Tensor branch;
  Tensor scale;  // [D] float32, where there is a scale
  Tensor gate;   // where there is a gate
};
ScaleAddGradients scale_add_backward(const SessionRef& session, const Tensor& d_out, const Tensor& branch, const Tensor& scale, const Tensor& gate);

Tensor swiglu_backward(const SessionRef& session, const Tensor& x, const Tensor& d_out);

/// a + factor * scale * b, with factor element `index` of a float32 vector on the device; a and factor may be empty (0 and 1).
Tensor add(const SessionRef& session, const Tensor& a, const Tensor& b, const Tensor& factor, int64_t index, float scale);

/// Sum over all dimensions but the last `kept`: float32.
Tensor sum_rows(const SessionRef& session, const Tensor& x, int kept);

/// Columns [part * n, (part + 1) * n) of x [..., parts * n]; and the reverse, of parts that may be empty (zero).
Tensor split(const SessionRef& session, const Tensor& x, int64_t part, int64_t parts);
Tensor concat(const SessionRef& session, const std::vector<Tensor>& parts);

}  // namespace uniflow::ops
