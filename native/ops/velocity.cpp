#include "native/ops/velocity.h"

#include <algorithm>

#include "native/core/command.h"

namespace uniflow {
namespace {

void apply(const FlowDevice& device, const LinearLayer& layer, const Tensor& x, int64_t rows, const Tensor& out, Activation activation = Activation::None) {
  device.kernels.linear({.x = x.data(), .weight = layer.weight.data(), .packing = layer.weight.packing().get(), .out = out.data(), .rows = rows,
                         .in = layer.weight.dim(1), .width = layer.weight.dim(0), .x_dtype = x.dtype(), .out_dtype = out.dtype(),
                         .bias = layer.bias ? layer.bias.data<float>() : nullptr, .activation = activation});
}

/// u = LN(h + gate * branch) * (1 + scale) + shift for rows [first, first + count); the sum is stored in h. Row r uses modulation row first
/// + (r - first) * step.
void modulated_norm(FlowWorkspace& w, int64_t first, int64_t count, int64_t step, const FlowBlock* block, const Tensor& modulation, int64_t parts,
                    const Tensor* before) {
  const int64_t d = w.width, element = size_of(w.u.dtype());
  auto part = [&](const Tensor& m, int64_t row_parts, int64_t i) { return m.data<std::byte>() + (first * row_parts + i) * d * element; };
  NormArgs a{.x = nullptr, .out = w.u.data<std::byte>() + first * d * element, .x_dtype = w.u.dtype(), .out_dtype = w.u.dtype(),
             .rows = count, .width = d, .x_stride = d, .out_stride = d, .rms = false, .eps = 1e-6f,
             .weight = block ? block->norm_weight.data<float>() : nullptr, .bias = block ? block->norm_bias.data<float>() : nullptr,
             .shift = part(modulation, parts, 0), .scale = part(modulation, parts, 1), .modulation_stride = step * parts * d,
             .residual = w.h.data<float>() + first * d};
  if (before) {
    a.branch = w.branch.data<std::byte>() + first * d * element;
    a.gate = part(*before, 3, 2);
    a.gate_stride = step * 3 * d;
  }
  w.device.kernels.norm(a);
}

void modulate(FlowWorkspace& w, const FlowRows& rows, const FlowBlock* block, const Tensor& modulation, int64_t parts, const Tensor* before) {
  modulated_norm(w, 0, rows.own, 1, block, modulation, parts, before);
  if (rows.free) modulated_norm(w, rows.own, rows.free, 0, block, modulation, parts, before);
}

}  // namespace

FlowWorkspace::FlowWorkspace(const FlowDevice& on, const FlowHead& head, const FlowRows& rows, DType dtype)
    : device(on), width(head.input.weight.dim(0)), pixels(head.input.weight.dim(1)) {
  embedding = on.scratch(DType::Float32, {rows.modulations(), width});
  y = on.scratch(dtype, {rows.modulations(), width});
  x = on.scratch(dtype, {rows.all(), pixels});
  h = on.scratch(DType::Float32, {rows.all(), width});
  for (Tensor* t : {&u, &hidden, &branch}) *t = on.scratch(dtype, {rows.all(), width});
  velocity = on.scratch(DType::Float32, {rows.all(), pixels});
  for (Tensor& m : modulation) m = on.scratch(dtype, {rows.modulations(), 3 * width});
}

bool is_guided(const ops::FlowOptions& o) { return o.guidance != 1.0f; }

Tensor time_input(const FlowDevice& device, const float* t, int64_t count, DType dtype) {
  const Tensor waves = device.scratch(DType::Float32, {count, kTimeChannels}), in = device.scratch(dtype, {count, kTimeChannels});
  device.kernels.timestep_embedding(t, count, waves.data<float>());
  device.kernels.cast(waves.data(), DType::Float32, in.data(), dtype, waves.size());
  return in;
}

Tensor time_embedding(const FlowDevice& device, const FlowHead& head, const Tensor& in) {
  const int64_t count = in.dim(0), width = head.time2.weight.dim(0);
  const Tensor hidden = device.scratch(in.dtype(), {count, width}), out = device.scratch(DType::Float32, {count, width});
  apply(device, head.time1, in, count, hidden, Activation::Silu);
  apply(device, head.time2, hidden, count, out);
  return out;
}

void embed_condition(const FlowHead& head, FlowWorkspace& w, const Tensor& condition, const FlowRows& rows) {
  apply(w.device, head.condition, condition, rows.own, w.embedding);
  const int64_t bytes = w.width * size_of(DType::Float32);
  if (rows.free) w.device.kernels.copy_rows(w.embedding.data<float>() + rows.own * w.width, bytes, head.condition.bias.data(), bytes, bytes, 1);
}

void embed_time(FlowWorkspace& w, const FlowRows& rows, const float* time, int64_t time_stride) {
  w.device.kernels.silu_sum(w.embedding.data<float>(), time, time_stride, w.y.data(), w.y.dtype(), rows.modulations(), w.width);
}

void velocity(const FlowHead& head, FlowWorkspace& w, const FlowRows& rows, const CancelToken* token) {
  const FlowDevice& on = w.device;
  apply(on, head.input, w.x, rows.all(), w.h);
  const Tensor* before = nullptr;
  for (size_t i = 0; i < head.blocks.size(); ++i) {
    if (token) token->throw_if_cancelled();
    const FlowBlock& block = head.blocks[i];
    const Tensor& modulation = w.modulation[i % 2];
    apply(on, block.modulation, w.y, rows.modulations(), modulation);
    modulate(w, rows, &block, modulation, 3, before);
    apply(on, block.fc1, w.u, rows.all(), w.hidden, Activation::Silu);
    apply(on, block.fc2, w.hidden, rows.all(), w.branch);
    before = &modulation;
  }
  const Tensor& modulation = w.modulation[head.blocks.size() % 2];
  apply(on, head.final_modulation, w.y, rows.modulations(), modulation);
  modulate(w, rows, nullptr, modulation, 2, before);
  apply(on, head.output, w.u, rows.all(), w.velocity);
}

void euler_step(const FlowHead& head, FlowWorkspace& w, const FlowRows& rows, const Tensor& times, size_t step, const ops::FlowOptions& o,
                const Tensor& x, const CancelToken* token) {
  const Kernels& k = w.device.kernels;
  const int64_t pixels = rows.own * w.pixels;
  embed_time(w, rows, times.data<float>() + static_cast<int64_t>(step) * w.width, 0);
  for (int64_t at = 0; at < rows.all(); at += rows.own)
    k.cast(x.data(), DType::Float32, w.x.data<std::byte>() + at * w.pixels * size_of(w.x.dtype()), w.x.dtype(), pixels);
  velocity(head, w, rows, token);
  const float* v = w.velocity.data<float>();
  k.euler(x.data<float>(), v, rows.free ? v + pixels : nullptr, o.guidance, o.schedule.step[step], pixels);
}

void write_pixels(const FlowDevice& device, const Tensor& x, const Tensor& pixels, const ops::FlowOptions& o, int64_t first, int64_t count) {
  FoldArgs fold{.patches = x.data<float>(), .pixels = pixels.data(), .pixel_dtype = pixels.dtype(), .first = first, .rows = count,
                .height = o.rows * o.patch, .width = o.cols * o.patch, .patch = o.patch, .mean = {}, .std = {}};
  std::copy(o.normalisation.mean.begin(), o.normalisation.mean.end(), fold.mean);
  std::copy(o.normalisation.std.begin(), o.normalisation.std.end(), fold.std);
  device.kernels.fold(fold);
}

const std::byte* rows_from(const Tensor& t, int64_t first) { return t.data<std::byte>() + first * t.dim(-1) * size_of(t.dtype()); }

}  // namespace uniflow
