#include "native/ops/flow.h"

#include "native/ops/check.h"

namespace uniflow::ops {
namespace {

void check_layer(const LinearLayer& layer, const std::string& name, int64_t out, int64_t in, DType dtype) {
  if (!layer.weight || layer.weight.shape() != Shape{out, in}) reject(name + ".weight", "a weight " + to_string({out, in}), describe(layer.weight));
  if (layer.weight.dtype() != dtype && layer.weight.dtype() != DType::Int8) reject(name + ".weight", std::string(name_of(dtype)) + " or int8", describe(layer.weight));
  check_optional_vector(layer.bias, (name + ".bias").c_str(), out);
  if (!layer.bias) reject(name + ".bias", "a vector " + to_string({out}), "nothing");
}

/// Checks every layer against the width D and returns it.
int64_t check_head(const FlowHead& head, const Tensor& condition) {
  check_floating(condition, "condition");
  const int64_t d = condition.dim(-1);
  const int64_t p = head.output.weight && head.output.weight.rank() == 2 ? head.output.weight.dim(0) : 0;
  check_positive(p, "output.weight");
  check_layer(head.time1, "time1", d, 256, condition.dtype());
  check_layer(head.time2, "time2", d, d, condition.dtype());
  check_layer(head.condition, "condition", d, d, condition.dtype());
  check_layer(head.input, "input", d, p, condition.dtype());
  check_layer(head.final_modulation, "finalModulation", 2 * d, d, condition.dtype());
  check_layer(head.output, "output", p, d, condition.dtype());
  for (const FlowBlock& b : head.blocks) {
    for (const auto& [t, name] : {std::pair{b.norm_weight, "block.normWeight"}, std::pair{b.norm_bias, "block.normBias"}}) {
      check_shape(t, name, {d});
      check_dtype(t, name, {DType::Float32});
    }
    check_layer(b.fc1, "block.fc1", d, d, condition.dtype());
    check_layer(b.fc2, "block.fc2", d, d, condition.dtype());
    check_layer(b.modulation, "block.modulation", 3 * d, d, condition.dtype());
  }
  return p;
}

/// All tensors that the queued op reads, to keep them alive and to see their failures.
std::vector<Tensor> tensors_of(const FlowHead& head) {
  std::vector<Tensor> all;
  auto add = [&](const LinearLayer& l) { all.insert(all.end(), {l.weight, l.bias}); };
  for (const LinearLayer* l : {&head.time1, &head.time2, &head.condition, &head.input, &head.final_modulation, &head.output}) add(*l);
  for (const FlowBlock& b : head.blocks) {
    all.insert(all.end(), {b.norm_weight, b.norm_bias});
    for (const LinearLayer* l : {&b.fc1, &b.fc2, &b.modulation}) add(*l);
  }
  return all;
}

}  // namespace

Tensor flow_integrate(const SessionRef& session, const FlowHead& head, const Tensor& condition, const FlowOptions& o) {
  for (const auto& [n, name] : {std::pair{o.rows, "rows"}, std::pair{o.cols, "cols"}, std::pair{o.patch, "patch"}}) check_positive(n, name);
  check_shape(condition, "condition", {-1, o.rows * o.cols, -1});
  const int64_t p = check_head(head, condition), batch = condition.dim(0);
  if (p != 3 * o.patch * o.patch) reject("patch", "a patch size p with 3*p*p = " + std::to_string(p), std::to_string(o.patch));
  if (o.schedule.time.empty() || o.schedule.time.size() != o.schedule.step.size())
    reject("schedule", "as many steps as times, at least one", std::to_string(o.schedule.time.size()));
  if (o.noise) {
    check_shape(o.noise, "noise", {batch, o.rows * o.cols, p});
    check_dtype(o.noise, "noise", {DType::Float32});
  } else if (static_cast<int64_t>(o.ids.size()) != batch) {
    reject("ids", std::to_string(batch) + " image ids", std::to_string(o.ids.size()));
  }
  const int64_t height = o.rows * o.patch, width = o.cols * o.patch;
  Tensor out(condition.device(), o.pixel_dtype, o.pixel_dtype == DType::UInt8 ? Shape{batch, height, width, 3} : Shape{batch, 3, height, width});
  check_dtype(out, "output", {DType::UInt8, DType::Float32});
  std::vector<Tensor> inputs = tensors_of(head);
  inputs.insert(inputs.end(), {condition, o.noise});
  enqueue(session, {"flowIntegrate", std::move(inputs), {out}, [=](const Run& run) {
    run.kernels.flow_integrate(head, condition, o, out, run.token);
  }});
  return out;
}

Tensor flow_velocity(const SessionRef& session, const FlowHead& head, const Tensor& x, const Tensor& t, const Tensor& condition) {
  check_shape(condition, "condition", {-1, -1});
  const int64_t p = check_head(head, condition), rows = condition.dim(0);
  check_shape(x, "x", {rows, p});
  check_shape(t, "t", {rows});
  check_dtype(x, "x", {DType::Float32});
  check_dtype(t, "t", {DType::Float32});
  Tensor out(condition.device(), DType::Float32, {rows, p});
  std::vector<Tensor> inputs = tensors_of(head);
  inputs.insert(inputs.end(), {x, t, condition});
  enqueue(session, {"flowVelocity", std::move(inputs), {out}, [=](const Run& run) {
    if (rows) run.kernels.flow_velocity(head, x, t, condition, out);
  }});
  return out;
}

Tensor timestep_embedding(const SessionRef& session, const Tensor& t) {
  check_shape(t, "t", {-1});
  check_dtype(t, "t", {DType::Float32});
  Tensor out(t.device(), DType::Float32, {t.dim(0), kTimeChannels});
  enqueue(session, {"timestepEmbedding", {t}, {out}, [=](const Run& run) {
    run.kernels.timestep_embedding(t.data<float>(), t.dim(0), out.data<float>());
  }});
  return out;
}

namespace {

/// [ids, patches]; args without `out` and `ids`.
Tensor drawn(const SessionRef& session, const char* op, const std::vector<uint32_t>& ids, const DrawArgs& args) {
  check_positive(args.patches, "patches");
  Tensor out(session->device(), DType::Float32, {args.images, args.patches});
  enqueue(session, {op, {}, {out}, [=](const Run& run) {
    DrawArgs a = args;
    a.out = out.data<float>();
    a.ids = ids.data();
    run.kernels.draw(a);
  }});
  return out;
}

}  // namespace

Tensor uniform(const SessionRef& session, uint64_t seed, const std::vector<uint32_t>& ids, int64_t patches) {
  return drawn(session, "uniform", ids, {.out = nullptr, .images = static_cast<int64_t>(ids.size()), .patches = patches, .seed = seed,
                                         .ids = nullptr, .logit_normal = false, .mean = 0, .std = 1});
}

Tensor logit_normal(const SessionRef& session, uint64_t seed, const std::vector<uint32_t>& ids, int64_t patches, float mean, float std, float zero) {
  if (!(zero >= 0 && zero <= 1)) reject("zero", "a share from 0 to 1", std::to_string(zero));
  return drawn(session, "logitNormal", ids, {.out = nullptr, .images = static_cast<int64_t>(ids.size()), .patches = patches, .seed = seed,
                                             .ids = nullptr, .logit_normal = true, .mean = mean, .std = std, .zero = zero});
}

Tensor noise(const SessionRef& session, uint64_t seed, const std::vector<uint32_t>& ids, int64_t patches, int64_t width) {
  check_positive(patches, "patches");
  check_positive(width, "width");
  const int64_t batch = static_cast<int64_t>(ids.size());
  Tensor out(session->device(), DType::Float32, {batch, patches, width});
  enqueue(session, {"noise", {}, {out}, [=](const Run& run) {
    run.kernels.noise({.out = out.data<float>(), .first = 0, .rows = batch * patches, .width = width, .patches = patches,
                          .seed = seed, .ids = ids.data()});
  }});
  return out;
}

}  // namespace uniflow::ops
