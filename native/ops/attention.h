/// Multi-head self-attention over tokens, and the operations on q and k before it.
/// qkv [B, S, 3*D], columns q | k | v, D = heads * E. FLOPs 4*B*S*S*D, bytes 8*B*S*D in bfloat16.
#pragma once

#include "native/core/rope.h"
#include "native/ops/linear.h"

namespace uniflow::ops {

/// softmax(q k^T / sqrt(E)) v per head: [B, S, 3*D] -> [B, S, D].
Tensor attention(const SessionRef& session, const Tensor& qkv, int64_t heads);

/// The same, with the log_sum_exp [B, heads, S] float32 that the backward pass needs.
struct AttentionForward {
  Tensor out, log_sum_exp;
};
AttentionForward attention_forward(const SessionRef& session, const Tensor& qkv, int64_t heads);

/// Gradient of qkv, [B, S, 3*D]. The softmax is recomputed block by block. FLOPs 10*B*S*S*D.
Tensor attention_backward(const SessionRef& session, const Tensor& qkv, const Tensor& out, const Tensor& d_out, const Tensor& log_sum_exp,
                          int64_t heads);

/// RMSNorm of q and of k over their whole width D (InternViT-6B); v is copied.
Tensor qk_norm(const SessionRef& session, const Tensor& qkv, const Tensor& q_weight, const Tensor& k_weight, float eps);

struct QkNormGradients {
  Tensor qkv;
  Tensor q_weight, k_weight;  // [D] float32
};
QkNormGradients qk_norm_backward(const SessionRef& session, const Tensor& qkv, const Tensor& d_out, const Tensor& q_weight,
                                 const Tensor& k_weight, float eps);

/// Applies rotary positions to q and k of the tokens from `prefix` on (DINOv3). table [2, S - prefix, E]: cosines, sines. `inverse` rotates
/// backwards, which is the gradient.
Tensor rope(const SessionRef& session, const Tensor& qkv, int64_t heads, int64_t prefix, const Tensor& table, bool inverse = false);

/// Rotary table [2, rows*cols, E] float32: cosines and sines of the angles (row, column) * theta^-(4i/E) in `unit`. The row's E/4 angles
/// come first, then the column's; both are repeated once.
Tensor rope_table(const SessionRef& session, int64_t rows, int64_t cols, int64_t head_dim, float theta, RopeUnit unit);

}  // namespace uniflow::ops
