/// Linear layer: out = residual + scale * act(x W^T + bias).
/// x [..., K], W [N, K] packed, bias and scale [N] float32, residual and out [..., N].
/// FLOPs 2*M*N*K. Backends: native/cpu/linear.cpp, native/cuda/linear.cu.
#pragma once

#include "native/core/activation.h"
#include "native/core/command.h"

namespace uniflow {

namespace ops {

using SessionRef = std::shared_ptr<Session>;

struct LinearOptions {
  Tensor bias, scale, residual;  // empty if absent
  Activation activation = Activation::None;
};

/// Packs a plain weight [N, K] (float32 or bfloat16) for fast products in `dtype`.
Tensor pack_linear(const SessionRef& session, const Tensor& weight, DType dtype);

/// A packed weight as plain float32 [N, K].
Tensor unpack_linear(const SessionRef& session, const Tensor& weight);

/// Accepts a packed or a plain weight.
Tensor linear(const SessionRef& session, const Tensor& x, const Tensor& weight, const LinearOptions& options);

struct LinearGradients {
  Tensor x, weight, bias;  // weight [N, K] and bias [N] float32; empty if not requested
};

/// Gradients of x W^T + b (no activation, scale or residual); W is plain and has x's dtype.
LinearGradients linear_backward(const SessionRef& session, const Tensor& x, const Tensor& weight, const Tensor& d_out, bool want_x,
                                bool want_weight, bool want_bias);

}  // namespace ops
}  // namespace uniflow
