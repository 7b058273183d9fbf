/// Elementwise operations. Bytes: input once, output once.
#pragma once

#include "native/ops/linear.h"

namespace uniflow::ops {

/// The same values as float32 or bfloat16.
Tensor cast(const SessionRef& session, const Tensor& x, DType dtype);

/// silu(x[..., :n]) * x[..., n:], [..., 2n] -> [..., n].
Tensor swiglu(const SessionRef& session, const Tensor& x);

/// Fails x, and everything that depends on it, if any of its float32 values is NaN or infinite.
void check_finite(const SessionRef& session, const Tensor& x, const std::string& name);

/// The gradient of slice_tokens: [B, n, D] becomes tokens [begin, begin + n) of [B, total, D], zero elsewhere.
Tensor pad_tokens(const SessionRef& session, const Tensor& x, int64_t begin, int64_t total);

/// Tokens [begin, end) of every image: [B, S, D] -> [B, end - begin, D].
Tensor slice_tokens(const SessionRef& session, const Tensor& x, int64_t begin, int64_t end);

}  // namespace uniflow::ops
