/// Patches are taken in groups of a few hundred rows, and each group goes through all steps and blocks before the
/// next: its activations stay in the caches (512 rows x (P + 10 D) values), while the weights, the same for every
/// group, stream past at 1/512 byte per FLOP. The residual h and the pixels x stay float32 throughout.
#include "native/cpu/flow.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "native/core/parallel.h"
#include "native/cpu/kernels.h"
#include "native/cpu/linear.h"

namespace uniflow::cpu {
namespace {

constexpr int64_t kGroupRows = 512;

void apply(const LinearLayer& layer, const Tensor& x, int64_t rows, const Tensor& out, Activation activation = Activation::None) {
  linear({.x = x.data(), .weight = layer.weight.data(), .packing = layer.weight.packing().get(), .out = out.data(), .rows = rows,
          .in = layer.weight.dim(1), .width = layer.weight.dim(0), .x_dtype = x.dtype(), .out_dtype = out.dtype(), .bias = layer.bias ? layer.bias.data<float>() : nullptr,
          .activation = activation});
}

Tensor scratch(DType dtype, int64_t rows, int64_t cols) {
  Tensor t(dtype, {rows, cols});
  t.buffer()->allocate();
  return t;
}

/// What one group of rows needs on its way through the network.
struct Workspace {
  Workspace(const FlowHead& head, int64_t rows, DType dtype)
      : width(head.input.weight.dim(0)),
        pixels(head.input.weight.dim(1)),
        embedding(scratch(DType::Float32, rows, width)),
        y(scratch(dtype, rows, width)),
        x(scratch(dtype, rows, pixels)),
        h(scratch(DType::Float32, rows, width)),
        u(scratch(dtype, rows, width)),
        hidden(scratch(dtype, rows, width)),
        branch(scratch(dtype, rows, width)),
        velocity(scratch(DType::Float32, rows, pixels)) {
    for (Tensor& m : modulation) m = scratch(dtype, rows, 3 * width);
  }

  int64_t width, pixels;
  Tensor embedding;      // condition(c)
  Tensor y;              // silu(time + embedding)
  Tensor x, h, u, hidden, branch, velocity;
  Tensor modulation[2];  // of this block and of the one before, whose gate is applied with this block's norm
};

/// time(t): sinusoids of 1000 t, cosines first, then Linear-SiLU-Linear. [M] -> [M, D] float32.
Tensor time_embedding(const FlowHead& head, const float* t, int64_t count, DType dtype) {
  Tensor waves = scratch(DType::Float32, count, kTimeChannels);
  time_waves(t, count, waves.data<float>());
  const int64_t width = head.time2.weight.dim(0);
  Tensor in = scratch(dtype, count, kTimeChannels), hidden = scratch(dtype, count, width), out = scratch(DType::Float32, count, width);
  kernels().cast(waves.data(), DType::Float32, in.data(), dtype, waves.size());
  apply(head.time1, in, count, hidden, Activation::Silu);
  apply(head.time2, hidden, count, out);
  return out;
}

/// The rows of a group: those with a condition of their own, and behind them, for guidance, as many under the zero
/// condition. These all have one y, so their modulations are one row too, behind the others'.
struct Rows {
  int64_t own, free;
  int64_t all() const { return own + free; }
  int64_t modulations() const { return own + (free > 0 ? 1 : 0); }
};

/// u = LN(h + gate * branch) * (1 + scale) + shift for rows [first, first + count); h takes the sum. Row r takes modulation
/// row first + (r - first) * step.
void modulated_norm(Workspace& w, int64_t first, int64_t count, int64_t step, const FlowBlock* block, const Tensor& modulation, int64_t parts,
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
  kernels().norm(a);
}

void modulate(Workspace& w, const Rows& rows, const FlowBlock* block, const Tensor& modulation, int64_t parts, const Tensor* before) {
  modulated_norm(w, 0, rows.own, 1, block, modulation, parts, before);
  if (rows.free) modulated_norm(w, rows.own, rows.free, 0, block, modulation, parts, before);
}

/// w.velocity from w.x [rows.all, P] and w.y [rows.modulations, D].
void velocity(const FlowHead& head, Workspace& w, const Rows& rows, const CancelToken* token) {
  apply(head.input, w.x, rows.all(), w.h);
  const Tensor* before = nullptr;
  for (size_t i = 0; i < head.blocks.size(); ++i) {
    if (token) token->throw_if_cancelled();
    const FlowBlock& block = head.blocks[i];
    const Tensor& modulation = w.modulation[i % 2];
    apply(block.modulation, w.y, rows.modulations(), modulation);
    modulate(w, rows, &block, modulation, 3, before);
    apply(block.fc1, w.u, rows.all(), w.hidden, Activation::Silu);
    apply(block.fc2, w.hidden, rows.all(), w.branch);
    before = &modulation;
  }
  const Tensor& modulation = w.modulation[head.blocks.size() % 2];
  apply(head.final_modulation, w.y, rows.modulations(), modulation);
  modulate(w, rows, nullptr, modulation, 2, before);
  apply(head.output, w.u, rows.all(), w.velocity);
}

/// Rows [first, first + rows) of a [*, width] tensor.
const std::byte* row(const Tensor& t, int64_t first) { return t.data<std::byte>() + first * t.dim(-1) * size_of(t.dtype()); }

/// All steps for the `rows` patches whose pixels are in `x` [rows, P] float32.
void integrate_group(const FlowHead& head, Workspace& w, const Tensor& times, const ops::FlowOptions& o, Tensor& x, int64_t rows,
                     const CancelToken& token) {
  const Kernels& k = kernels();
  const bool guided = o.guidance != 1.0f;
  const Rows group{rows, guided ? rows : 0};
  const int64_t p = w.pixels, d = w.width;
  for (size_t step = 0; step < o.schedule.time.size(); ++step) {
    const float* time = times.data<float>() + static_cast<int64_t>(step) * d;
    k.silu_sum(w.embedding.data<float>(), time, 0, w.y.data(), w.y.dtype(), group.modulations(), d);
    for (int64_t at = 0; at < group.all(); at += rows)
      k.cast(x.data(), DType::Float32, w.x.data<std::byte>() + at * p * size_of(w.x.dtype()), w.x.dtype(), rows * p);
    velocity(head, w, group, &token);
    const float* v = w.velocity.data<float>();
    k.euler(x.data<float>(), v, guided ? v + rows * p : nullptr, o.guidance, o.schedule.step[step], rows * p);
  }
}

/// condition(c) of a group into w.embedding; behind it, for guidance, a row with that of c = 0, which is the bias.
void embed_condition(const FlowHead& head, Workspace& w, const Tensor& condition, int64_t first, int64_t rows, bool guided) {
  std::memcpy(w.u.data(), row(condition, first), static_cast<size_t>(rows * w.width * size_of(condition.dtype())));
  apply(head.condition, w.u, rows, w.embedding);
  if (guided) std::copy_n(head.condition.bias.data<float>(), w.width, w.embedding.data<float>() + rows * w.width);
}

void write_pixels(const Tensor& x, const Tensor& pixels, const ops::FlowOptions& o, int64_t first, int64_t rows) {
  FoldArgs fold{.patches = x.data<float>(), .pixels = pixels.data(), .pixel_dtype = pixels.dtype(), .first = first, .rows = rows,
                .height = o.rows * o.patch, .width = o.cols * o.patch, .patch = o.patch, .mean = {}, .std = {}};
  std::copy(o.normalisation.mean.begin(), o.normalisation.mean.end(), fold.mean);
  std::copy(o.normalisation.std.begin(), o.normalisation.std.end(), fold.std);
  kernels().fold(fold);
}

}  // namespace

void time_waves(const float* t, int64_t count, float* out) {
  constexpr int64_t half = kTimeChannels / 2;
  double frequency[half];
  for (int64_t i = 0; i < half; ++i) frequency[i] = 1000.0 * std::exp(-std::log(10000.0) * static_cast<double>(i) / half);
  parallel_for(count, [&](int64_t m) {
    for (int64_t i = 0; i < half; ++i) {  // in double: the angle reaches 1000, where float32 has only 4 digits left
      out[m * kTimeChannels + i] = static_cast<float>(std::cos(t[m] * frequency[i]));
      out[m * kTimeChannels + half + i] = static_cast<float>(std::sin(t[m] * frequency[i]));
    }
  });
}

void flow_integrate(const FlowHead& head, const Tensor& condition, const ops::FlowOptions& o, const Tensor& pixels, const CancelToken& token) {
  const bool guided = o.guidance != 1.0f;
  const int64_t patches = condition.dim(1), total = condition.dim(0) * patches, group = std::min(total, guided ? kGroupRows / 2 : kGroupRows);
  const Tensor times = time_embedding(head, o.schedule.time.data(), static_cast<int64_t>(o.schedule.time.size()), condition.dtype());
  Workspace w(head, guided ? 2 * group : group, condition.dtype());
  Tensor x = scratch(DType::Float32, group, w.pixels);
  for (int64_t first = 0; first < total; first += group) {
    const int64_t rows = std::min(group, total - first);
    if (o.noise) {
      std::memcpy(x.data(), row(o.noise, first), static_cast<size_t>(rows * w.pixels) * sizeof(float));
    } else {
      kernels().noise({.out = x.data<float>(), .first = first, .rows = rows, .width = w.pixels, .patches = patches, .seed = o.seed,
                       .ids = o.ids.data()});
    }
    embed_condition(head, w, condition, first, rows, guided);
    integrate_group(head, w, times, o, x, rows, token);
    write_pixels(x, pixels, o, first, rows);
  }
}

void flow_velocity(const FlowHead& head, const Tensor& x, const Tensor& t, const Tensor& condition, const Tensor& out) {
  const int64_t rows = x.dim(0);
  Workspace w(head, rows, condition.dtype());
  const Tensor times = time_embedding(head, t.data<float>(), rows, condition.dtype());
  embed_condition(head, w, condition, 0, rows, false);
  kernels().silu_sum(w.embedding.data<float>(), times.data<float>(), w.width, w.y.data(), w.y.dtype(), rows, w.width);
  kernels().cast(x.data(), DType::Float32, w.x.data(), w.x.dtype(), x.size());
  velocity(head, w, {rows, 0}, nullptr);
  std::memcpy(out.data(), w.velocity.data(), static_cast<size_t>(out.bytes()));
}

}  // namespace uniflow::cpu
