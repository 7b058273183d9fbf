/// Linear layer: out = residual + scale * act(x W^T + bias).
/// x [..., K], W [N, K] packed, bias and scale [N] float32, residual and out [..., N].
/// FLOPs 2*M*N*K. Backends: native/cpu/linear.cpp.
#pragma once

#include "native/core/activation.h"
#include "native/core/stream.h"

namespace uniflow {

namespace ops {

using SessionRef = std::shared_ptr<Session>;

struct LinearOptions {
  Tensor bias, scale, residual;  // empty where absent
  Activation activation = Activation::None;
};

/// Stores a plain weight [N, K] (float32 or bfloat16) as products in `dtype` read it fastest.
Tensor pack_linear(const SessionRef& session, const Tensor& weight, DType dtype);

/// The plain float32 [N, K] of a packed weight.
Tensor unpack_linear(const SessionRef& session, const Tensor& weight);

/// The weight may be packed or plain.
Tensor linear(const SessionRef& session, const Tensor& x, const Tensor& weight, const LinearOptions& options);

struct LinearGradients {
  Tensor x, weight, bias;  // weight [N, K] and bias [N] float32; empty where not asked for
};

/// Gradients of x W^T + b (no activation, no scale, no residual); W plain, of x's dtype.
LinearGradients linear_backward(const SessionRef& session, const Tensor& x, const Tensor& weight, const Tensor& d_out, bool want_x,
                                bool want_weight, bool want_bias);

}  // namespace ops
}  // namespace uniflow
