/// Stand-alone activations and residual connections, with their backward passes. Training uses these; inference fuses them into linear().
/// Bytes: every operand once.
#pragma once

#include "native/ops/linear.h"

namespace uniflow::ops {

Tensor activation(const SessionRef& session, const Tensor& x, Activation kind);
/// d_x, computed from the activation's input.
Tensor activation_backward(const SessionRef& session, const Tensor& x, const Tensor& d_out, Activation kind);

/// residual + scale * branch (LayerScale [D]) or residual + gate * branch (AdaLN, same shape as branch); either may be empty.
Tensor scale_add(const SessionRef& session, const Tensor& residual, const Tensor& branch, const Tensor& scale, const Tensor& gate);

struct ScaleAddGradients {
  Tensor branch;
  Tensor scale;  // [D] float32, if there is a scale
  Tensor gate;   // if there is a gate
};
ScaleAddGradients scale_add_backward(const SessionRef& session, const Tensor& d_out, const Tensor& branch, const Tensor& scale, const Tensor& gate);

Tensor swiglu_backward(const SessionRef& session, const Tensor& x, const Tensor& d_out);

/// a + factor * scale * b; the factor is element `index` of a float32 vector on the device. a and factor may be empty (0 and 1).
Tensor add(const SessionRef& session, const Tensor& a, const Tensor& b, const Tensor& factor, int64_t index, float scale);

/// Sum over all dimensions except the last `kept`, in float32.
Tensor sum_rows(const SessionRef& session, const Tensor& x, int kept);

/// Columns [part * n, (part + 1) * n) of x [..., parts * n]; and the inverse, whose parts may be empty (zero).
Tensor split(const SessionRef& session, const Tensor& x, int64_t part, int64_t parts);
Tensor concat(const SessionRef& session, const std::vector<Tensor>& parts);

}  // namespace uniflow::ops
