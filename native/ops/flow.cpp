#include "native/ops/flow.h"

#include <cmath>

#include "native/core/philox.h"
#include "native/cpu/flow.h"
#include "native/cpu/kernels.h"
#include "native/ops/check.h"

namespace uniflow::ops {
namespace {

void check_layer(const LinearLayer& layer, const std::string& name, int64_t out, int64_t in, DType dtype) {
  if (!layer.weight || layer.weight.shape() != Shape{out, in}) reject(name + ".weight", "a weight " + to_string({out, in}), describe(layer.weight));
  if (layer.weight.dtype() != dtype) reject(name + ".weight", name_of(dtype), describe(layer.weight));
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

/// Everything that the queued op reads, so that it stays alive and its failures are seen.
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
  Tensor out(o.pixel_dtype, o.pixel_dtype == DType::UInt8 ? Shape{batch, height, width, 3} : Shape{batch, 3, height, width});
  check_dtype(out, "output", {DType::UInt8, DType::Float32});
  std::vector<Tensor> inputs = tensors_of(head);
  inputs.insert(inputs.end(), {condition, o.noise});
  Stream::cpu().enqueue(session, {"flowIntegrate", std::move(inputs), {out}, [=](const CancelToken& token) {
    cpu::flow_integrate(head, condition, o, out, token);
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
  Tensor out(DType::Float32, {rows, p});
  std::vector<Tensor> inputs = tensors_of(head);
  inputs.insert(inputs.end(), {x, t, condition});
  Stream::cpu().enqueue(session, {"flowVelocity", std::move(inputs), {out}, [=](const CancelToken&) {
    if (rows) cpu::flow_velocity(head, x, t, condition, out);
  }});
  return out;
}

Tensor time_waves(const SessionRef& session, const Tensor& t) {
  check_shape(t, "t", {-1});
  check_dtype(t, "t", {DType::Float32});
  Tensor out(DType::Float32, {t.dim(0), cpu::kTimeChannels});
  Stream::cpu().enqueue(session, {"timeWaves", {t}, {out}, [=](const CancelToken&) {
    cpu::time_waves(t.data<float>(), t.dim(0), out.data<float>());
  }});
  return out;
}

namespace {

/// [ids, patches] of what `draw` makes of the Philox block of (seed, id, patch).
template <class Draw>
Tensor drawn(const SessionRef& session, const char* op, uint64_t seed, const std::vector<uint32_t>& ids, int64_t patches, Draw draw) {
  check_positive(patches, "patches");
  const int64_t batch = static_cast<int64_t>(ids.size());
  Tensor out(DType::Float32, {batch, patches});
  Stream::cpu().enqueue(session, {op, {}, {out}, [=](const CancelToken&) {
    for (int64_t i = 0; i < batch * patches; ++i)
      out.data<float>()[i] = draw(philox({0, static_cast<uint32_t>(i % patches), ids[static_cast<size_t>(i / patches)], 2}, seed));
  }});
  return out;
}

}  // namespace

Tensor uniform(const SessionRef& session, uint64_t seed, const std::vector<uint32_t>& ids, int64_t patches) {
  return drawn(session, "uniform", seed, ids, patches, [](const auto& block) { return philox_uniform(block[0]); });
}

Tensor logit_normal(const SessionRef& session, uint64_t seed, const std::vector<uint32_t>& ids, int64_t patches, float mean, float std) {
  return drawn(session, "logitNormal", seed, ids, patches,
               [=](const auto& block) { return 1.0f / (1.0f + std::exp(-(mean + std * philox_normal(block)[0]))); });
}

Tensor noise(const SessionRef& session, uint64_t seed, const std::vector<uint32_t>& ids, int64_t patches, int64_t width) {
  check_positive(patches, "patches");
  check_positive(width, "width");
  const int64_t batch = static_cast<int64_t>(ids.size());
  Tensor out(DType::Float32, {batch, patches, width});
  Stream::cpu().enqueue(session, {"noise", {}, {out}, [=](const CancelToken&) {
    cpu::kernels().noise({.out = out.data<float>(), .first = 0, .rows = batch * patches, .width = width, .patches = patches,
                          .seed = seed, .ids = ids.data()});
  }});
  return out;
}

}  // namespace uniflow::ops
