/// One optimizer step over a list of parameters: global gradient norm, clipping, AdamW (decoupled weight decay), moving average. Bytes per
/// parameter: 28, + 8 with a moving average, + 2 with a bfloat16 copy.
#pragma once

#include "native/ops/linear.h"

namespace uniflow::ops {

/// Square root of the sum of squares over all gradients (at least one): [1] float32.
Tensor global_norm(const SessionRef& session, const std::vector<Tensor>& grads);

struct OptimizedParameter {
  Tensor parameter;  // float32, changed in place
  Tensor grad;       // float32
  Tensor m, v;       // float32, changed in place
  Tensor average;    // float32, changed in place; empty if absent
  Tensor compute;    // bfloat16 copy of the parameter, overwritten; empty if absent
  float lr, weight_decay;
};

struct AdamWOptions {
  float beta1, beta2, eps;
  float ema;       // weight of the old value in the moving average
  float clip;      // largest global norm; 0 disables clipping
  int64_t step;    // from 1
};

/// Updates all parameters. Nothing changes if `norm` is not finite.
void adamw(const SessionRef& session, const std::vector<OptimizedParameter>& parameters, const Tensor& norm, const AdamWOptions& options);

}  // namespace uniflow::ops
