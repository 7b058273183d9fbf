#include "native/ops/losses.h"

#include "native/ops/check.h"

namespace uniflow::ops {
namespace {

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
  Device& device = student[0].device();
  Distillation d{Tensor(device, DType::Float32, {1}), Tensor(device, DType::Float32, {layers}), Tensor(device, DType::Float32, {layers}), {}};
  std::vector<Tensor> outputs{d.loss, d.alpha, d.weight}, inputs = student;
  if (want_grads)
    for (const Tensor& s : student) d.grads.emplace_back(device, s.dtype(), s.shape());
  outputs.insert(outputs.end(), d.grads.begin(), d.grads.end());
  inputs.insert(inputs.end(), teacher.begin(), teacher.end());
  enqueue(session, {"distillation", std::move(inputs), std::move(outputs), [=](const Run& run) {
    const auto pointers = [](const std::vector<Tensor>& stack) {
      std::vector<void*> p;
      for (const Tensor& t : stack) p.push_back(t.data());
      return p;
    };
    const std::vector<void*> s = pointers(student), t = pointers(teacher), g = pointers(d.grads);
    const Tensor& like = student[0];
    run.kernels.distillation({.student = s.data(), .teacher = t.data(), .grad = want_grads ? g.data() : nullptr, .dtype = like.dtype(),
                              .layers = layers, .batch = like.dim(0), .tokens = like.dim(1), .width = like.dim(2), .skip = skip, .beta = beta,
                              .weights = weights, .loss = d.loss.data<float>(), .alpha = d.alpha.data<float>(), .weight = d.weight.data<float>()});
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
  FlowPair pair{Tensor(data.device(), DType::Float32, data.shape()), Tensor(data.device(), DType::Float32, data.shape())};
  enqueue(session, {"interpolate", {data, noise, t}, {pair.noisy, pair.target}, [=](const Run& run) {
    run.kernels.interpolate(data.data<float>(), noise.data<float>(), t.data<float>(), pair.noisy.data<float>(), pair.target.data<float>(),
                               data.dim(0), data.dim(1));
  }});
  return pair;
}

Loss mean_squared_error(const SessionRef& session, const Tensor& value, const Tensor& target) {
  check_dtype(value, "value", {DType::Float32});
  check_shape(target, "target", value.shape());
  check_dtype(target, "target", {DType::Float32});
  Loss out{Tensor(value.device(), DType::Float32, {1}), Tensor(value.device(), DType::Float32, value.shape())};
  enqueue(session, {"meanSquaredError", {value, target}, {out.loss, out.grad}, [=](const Run& run) {
    run.kernels.mean_squared_error(value.data<float>(), target.data<float>(), out.grad.data<float>(), out.loss.data<float>(), value.size());
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
  Device& device = logits.device();
  CrossEntropy out{Tensor(device, DType::Float32, {1}), Tensor(device, logits.dtype(), logits.shape()), Tensor(device, DType::Float32, {1})};
  enqueue(session, {"crossEntropy", {logits, labels}, {out.loss, out.grad, out.correct}, [=](const Run& run) {
    const int64_t bad = run.kernels.cross_entropy({.logits = logits.data(), .labels = labels.data<int32_t>(), .grad = out.grad.data(),
                                                      .dtype = logits.dtype(), .rows = rows, .classes = classes,
                                                      .loss = out.loss.data<float>(), .correct = out.correct.data<float>()});
    if (bad) reject("labels", "classes 0 to " + std::to_string(classes - 1), std::to_string(bad) + " of " + std::to_string(rows) + " outside");
  }});
  return out;
}

}  // namespace uniflow::ops
