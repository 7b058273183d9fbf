/// Linear layer: out = residual + scale * act(x W^T + bias).
/// x [..., K], W [N, K] packed, bias and scale [N] float32, residual and out [..., N].
/// FLOPs 2*M*N*K. Backends: native/cpu/linear.cpp.
#pragma once

#include "native/core/stream.h"

namespace uniflow {

enum class Activation { None, Gelu, GeluTanh, QuickGelu, Silu };

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

Tensor linear(const SessionRef& session, const Tensor& x, const Tensor& weight, const LinearOptions& options);

}  // namespace ops
}  // namespace uniflow
