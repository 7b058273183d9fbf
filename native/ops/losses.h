/// Training losses, each with its gradient from the same pass.
#pragma once

#include "native/ops/kernels.h"
#include "native/ops/linear.h"

namespace uniflow::ops {

/// Layer-wise adaptive self-distillation (paper: L_dist, w_l, alpha_l):
///   alpha_l = mean over compared tokens of (1 - cos(student_l, teacher_l)),
///   w_l = (l/L) exp(beta alpha_l) / sum_k (k/L) exp(beta alpha_k),   loss = sum_l w_l alpha_l.
/// A token whose student or teacher norm is <= 1e-8 has cosine 0 and no gradient. The weights are constants for the gradient and known only
/// once all layers are seen. So `grads` are the gradients of the alphas; the caller multiplies grads[l] by weight[l].
/// Bytes: both stacks read once, the gradient written once.
struct Distillation {
  Tensor loss;                // [1] float32
  Tensor alpha, weight;       // [L] float32
  std::vector<Tensor> grads;  // d alpha_l / d student_l, with the student's shape and dtype; empty if not requested
};

/// student, teacher: L tensors [B, S, D], layer 1 first. The first `skip` tokens of each image are not compared.
Distillation distillation(const SessionRef& session, const std::vector<Tensor>& student, const std::vector<Tensor>& teacher, float beta,
                          int64_t skip, LayerWeights weights, bool want_grads);

/// Training pair of rectified flow: noisy = t * data + (1 - t) * noise, target = data - noise. data, noise [M, P], t [M], float32.
struct FlowPair {
  Tensor noisy, target;
};
FlowPair interpolate(const SessionRef& session, const Tensor& data, const Tensor& noise, const Tensor& t);

struct Loss {
  Tensor loss;  // [1] float32
  Tensor grad;  // shaped as the first argument, float32
};
Loss mean_squared_error(const SessionRef& session, const Tensor& value, const Tensor& target);

/// Cross-entropy of rows of logits, one label each: mean of -log softmax(logits)[label], natural logarithm.
/// Bytes: logits read once, gradient written once.
struct CrossEntropy {
  Tensor loss;     // [1] float32
  Tensor grad;     // gradient of the mean, with the shape and dtype of the logits
  Tensor correct;  // [1] float32: rows whose label is the largest logit, the first one if several are equal
};

/// logits [M, C] float32 or bfloat16, labels [M] int32. A label outside 0 to C-1 fails the results when they are computed.
CrossEntropy cross_entropy(const SessionRef& session, const Tensor& logits, const Tensor& labels);

}  // namespace uniflow::ops
