#include "native/ops/losses.h"

#include <cmath>

#include "native/cpu/kernels.h"
#include "native/ops/check.h"

namespace uniflow::ops {
namespace {

/// w_l from the alphas; in double, for exp(beta alpha) spans orders of magnitude.
std::vector<double> layer_weights(const float* alpha, int64_t layers, float beta, LayerWeights kind) {
  std::vector<double> w(static_cast<size_t>(layers));
  double total = 0;
  for (int64_t l = 0; l < layers; ++l) {
    const double prior = static_cast<double>(l + 1) / static_cast<double>(layers);
    double v = prior * std::exp(static_cast<double>(beta) * alpha[l]);
    if (kind == LayerWeights::Uniform) v = 1;
    if (kind == LayerWeights::Last) v = l + 1 == layers ? 1 : 0;
    total += w[static_cast<size_t>(l)] = v;
  }
  for (double& v : w) v /= total;
  return w;
}

void check_stack(const std::vector<Tensor>& stack, const char* name, const Tensor& like) {
  for (size_t l = 0; l < stack.size(); ++l) {
    const std::string layer = std::string(name) + "[" + std::to_string(l) + "]";
    check_shape(stack[l], layer.c_str(), like.shape());
    check_dtype(stack[l], layer.c_str(), {like.dtype()});
  }
}

}  // namespace

Distillation distillation(const SessionRef& session, const std::vector<Tensor>& student, const std::vector<Tensor>& teacher, float beta,
                          int64_t skip, LayerWeights weights, bool want_grads) {
  if (student.empty() || student.size() != teacher.size())
    reject("teacher", "as many layers as the student, at least one", std::to_string(teacher.size()));
  check_shape(student[0], "student[0]", {-1, -1, -1});
  check_floating(student[0], "student[0]");
  check_stack(student, "student", student[0]);
  check_stack(teacher, "teacher", student[0]);
  if (skip < 0 || skip >= student[0].dim(1)) reject("skip", "fewer than the " + std::to_string(student[0].dim(1)) + " tokens", std::to_string(skip));
  const int64_t layers = static_cast<int64_t>(student.size());
  Distillation d{Tensor(DType::Float32, {1}), Tensor(DType::Float32, {layers}), Tensor(DType::Float32, {layers}), {}};
  std::vector<Tensor> outputs{d.loss, d.alpha, d.weight}, inputs = student;
  if (want_grads)
    for (const Tensor& s : student) d.grads.emplace_back(s.dtype(), s.shape());
  outputs.insert(outputs.end(), d.grads.begin(), d.grads.end());
  inputs.insert(inputs.end(), teacher.begin(), teacher.end());
  Stream::cpu().enqueue(session, {"distillation", std::move(inputs), std::move(outputs), [=](const CancelToken&) {
    float* alpha = d.alpha.data<float>();
    for (int64_t l = 0; l < layers; ++l) {
      const Tensor& s = student[static_cast<size_t>(l)];
      alpha[l] = cpu::kernels().distillation({.student = s.data(), .teacher = teacher[static_cast<size_t>(l)].data(),
                                              .grad = want_grads ? d.grads[static_cast<size_t>(l)].data() : nullptr, .dtype = s.dtype(),
                                              .batch = s.dim(0), .tokens = s.dim(1), .width = s.dim(2), .skip = skip});
    }
    const std::vector<double> w = layer_weights(alpha, layers, beta, weights);
    double loss = 0;
    for (size_t l = 0; l < w.size(); ++l) {
      loss += w[l] * alpha[l];
      d.weight.data<float>()[l] = static_cast<float>(w[l]);
    }
    *d.loss.data<float>() = static_cast<float>(loss);
  }});
  return d;
}

FlowPair interpolate(const SessionRef& session, const Tensor& data, const Tensor& noise, const Tensor& t) {
  check_shape(data, "data", {-1, -1});
  check_dtype(data, "data", {DType::Float32});
  check_shape(noise, "noise", data.shape());
  check_dtype(noise, "noise", {DType::Float32});
  check_shape(t, "t", {data.dim(0)});
  check_dtype(t, "t", {DType::Float32});
  FlowPair pair{Tensor(DType::Float32, data.shape()), Tensor(DType::Float32, data.shape())};
  Stream::cpu().enqueue(session, {"interpolate", {data, noise, t}, {pair.noisy, pair.target}, [=](const CancelToken&) {
    cpu::kernels().interpolate(data.data<float>(), noise.data<float>(), t.data<float>(), pair.noisy.data<float>(), pair.target.data<float>(),
                               data.dim(0), data.dim(1));
  }});
  return pair;
}

Loss mean_squared_error(const SessionRef& session, const Tensor& value, const Tensor& target) {
  check_dtype(value, "value", {DType::Float32});
  check_shape(target, "target", value.shape());
  check_dtype(target, "target", {DType::Float32});
  Loss out{Tensor(DType::Float32, {1}), Tensor(DType::Float32, value.shape())};
  Stream::cpu().enqueue(session, {"meanSquaredError", {value, target}, {out.loss, out.grad}, [=](const CancelToken&) {
    *out.loss.data<float>() = static_cast<float>(
        cpu::kernels().mean_squared_error(value.data<float>(), target.data<float>(), out.grad.data<float>(), value.size()));
  }});
  return out;
}

CrossEntropy cross_entropy(const SessionRef& session, const Tensor& logits, const Tensor& labels) {
  check_shape(logits, "logits", {-1, -1});
  check_floating(logits, "logits");
  const int64_t rows = logits.dim(0), classes = logits.dim(1);
  if (rows < 1 || classes < 1) reject("logits", "at least one row and a class", describe(logits));
  check_shape(labels, "labels", {rows});
  check_dtype(labels, "labels", {DType::Int32});
  CrossEntropy out{Tensor(DType::Float32, {1}), Tensor(logits.dtype(), logits.shape()), Tensor(DType::Float32, {1})};
  Stream::cpu().enqueue(session, {"crossEntropy", {logits, labels}, {out.loss, out.grad, out.correct}, [=](const CancelToken&) {
    const int64_t bad = cpu::kernels().cross_entropy({.logits = logits.data(), .labels = labels.data<int32_t>(), .grad = out.grad.data(),
                                                      .dtype = logits.dtype(), .rows = rows, .classes = classes,
                                                      .loss = out.loss.data<float>(), .correct = out.correct.data<float>()});
    if (bad) reject("labels", "classes 0 to " + std::to_string(classes - 1), std::to_string(bad) + " of " + std::to_string(rows) + " outside");
  }});
  return out;
}

}  // namespace uniflow::ops
