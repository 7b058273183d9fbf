#include "native/ops/optimizer.h"

#include <cmath>
#include <tuple>

#include "native/ops/check.h"

namespace uniflow::ops {

Tensor global_norm(const SessionRef& session, const std::vector<Tensor>& grads) {
  for (const Tensor& g : grads) check_dtype(g, "grad", {DType::Float32});
  if (grads.empty()) reject("grads", "at least one gradient", "none");
  Tensor out(grads[0].device(), DType::Float32, {1});
  enqueue(session, {"globalNorm", grads, {out}, [=](const Run& run) {
    std::vector<const float*> data;
    std::vector<int64_t> sizes;
    for (const Tensor& g : grads) {
      data.push_back(g.data<float>());
      sizes.push_back(g.size());
    }
    run.kernels.global_norm(data.data(), sizes.data(), static_cast<int64_t>(grads.size()), out.data<float>());
  }});
  return out;
}

void adamw(const SessionRef& session, const std::vector<OptimizedParameter>& parameters, const Tensor& norm, const AdamWOptions& o) {
  check_shape(norm, "norm", {1});
  check_positive(o.step, "step");
  std::vector<Tensor> inputs{norm};
  for (const OptimizedParameter& p : parameters) {
    check_dtype(p.parameter, "parameter", {DType::Float32});
    for (const auto& [t, name] : {std::pair{p.grad, "grad"}, std::pair{p.m, "m"}, std::pair{p.v, "v"}}) {
      check_dtype(t, name, {DType::Float32});
      if (t.size() != p.parameter.size()) reject(name, to_string(p.parameter.shape()), describe(t));
    }
    for (const auto& [t, name, dtype] : {std::tuple{p.average, "average", DType::Float32}, std::tuple{p.compute, "compute", DType::BFloat16}}) {
      if (!t) continue;
      check_dtype(t, name, {dtype});
      if (t.packing() || t.size() != p.parameter.size()) reject(name, to_string(p.parameter.shape()), describe(t));
    }
    inputs.insert(inputs.end(), {p.parameter, p.grad, p.m, p.v, p.average});
  }
  // No outputs: if a gradient has failed, the parameters must keep their values, not fail with it.
  enqueue(session, {"adamw", std::move(inputs), {}, [=](const Run& run) {
    const double step = static_cast<double>(o.step);
    std::vector<AdamWParameter> list;
    for (const OptimizedParameter& p : parameters) {
      list.push_back({.parameter = p.parameter.data<float>(), .grad = p.grad.data<float>(), .m = p.m.data<float>(), .v = p.v.data<float>(),
                      .average = p.average ? p.average.data<float>() : nullptr, .compute = p.compute ? p.compute.data() : nullptr,
                      .n = p.parameter.size(), .lr = p.lr, .weight_decay = p.weight_decay});
    }
    run.kernels.adamw({.parameters = list.data(), .count = static_cast<int64_t>(list.size()), .norm = norm.data<float>(), .clip = o.clip,
                       .beta1 = o.beta1, .beta2 = o.beta2, .eps = o.eps, .ema = o.ema,
                       .correction1 = static_cast<float>(1 - std::pow(static_cast<double>(o.beta1), step)),
                       .correction2 = static_cast<float>(1 - std::pow(static_cast<double>(o.beta2), step))});
  }});
}

}  // namespace uniflow::ops
