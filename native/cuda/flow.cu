/// The flow head: what native/cpu/flow.cpp does, made of the same kernels.
///
/// Patches are taken in equal groups of up to 8192 rows, and each group goes through all steps and blocks before the next. So many rows give
/// a product enough tiles to keep every multiprocessor busy (256 of 128 x 256 at a width of 1024); with more, what one kernel writes for the
/// next (16 MiB in bfloat16) would no longer be in the second-level cache. Floor: FLOPs.
///
/// A group's kernels are the same whenever the weights, the rows and the schedule are: they are recorded as a Graph and launched as one, for
/// with the few rows of a single image each takes less time than launching it. A key's first group is not recorded: it lets linear() time
/// its algorithms, and many keys are seen once.
#include <algorithm>
#include <bit>
#include <cmath>
#include <list>

#include "native/core/stream.h"
#include "native/cuda/device.cuh"
#include "native/cuda/kernels.h"
#include "native/ops/flow.h"

namespace uniflow::cuda {
namespace {

constexpr int64_t kGroupRows = 8192;
constexpr int64_t kRecordedBlocks = 1024;  // steps x blocks of a graph: some thousand kernels
constexpr size_t kGraphs = 4;              // kept, each with the memory of its group

// --- the network --------------------------------------------------------------------------------------------------------

void apply(const LinearLayer& layer, const Tensor& x, int64_t rows, const Tensor& out, Activation activation = Activation::None) {
  linear({.x = x.data(), .weight = layer.weight.data(), .packing = layer.weight.packing().get(), .out = out.data(), .rows = rows,
          .in = layer.weight.dim(1), .width = layer.weight.dim(0), .x_dtype = x.dtype(), .out_dtype = out.dtype(),
          .bias = layer.bias ? layer.bias.data<float>() : nullptr, .activation = activation});
}

void copy(void* to, const void* from, int64_t bytes) {
  check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, stream()), "cudaMemcpyAsync");
}

/// The rows of a group: those with a condition of their own, and behind them, for guidance, as many under the zero
/// condition. These all have one y, so their modulations are one row too, behind the others'.
struct Rows {
  int64_t own, free;
  int64_t all() const { return own + free; }
  int64_t modulations() const { return own + (free > 0 ? 1 : 0); }
};

/// What one group of rows needs on its way through the network.
struct Workspace {
  Workspace(const FlowHead& head, const Rows& rows, DType dtype)
      : width(head.input.weight.dim(0)),
        pixels(head.input.weight.dim(1)),
        embedding(scratch(DType::Float32, {rows.modulations(), width})),
        y(scratch(dtype, {rows.modulations(), width})),
        x(scratch(dtype, {rows.all(), pixels})),
        h(scratch(DType::Float32, {rows.all(), width})),
        u(scratch(dtype, {rows.all(), width})),
        hidden(scratch(dtype, {rows.all(), width})),
        branch(scratch(dtype, {rows.all(), width})),
        velocity(scratch(DType::Float32, {rows.all(), pixels})) {
    for (Tensor& m : modulation) m = scratch(dtype, {rows.modulations(), 3 * width});
  }

  int64_t width, pixels;
  Tensor embedding;  // condition(c)
  Tensor y;          // silu(time + embedding)
  Tensor x, h, u, hidden, branch, velocity;
  Tensor modulation[2];  // of this block and of the one before, whose gate is applied with this block's norm
};

/// Sinusoids of the times, on the device, in the type of the network: [count, 256].
Tensor time_input(const float* t, int64_t count, DType dtype) {
  const Tensor waves = scratch(DType::Float32, {count, kTimeChannels}), in = scratch(dtype, {count, kTimeChannels});
  time_waves(t, count, waves.data<float>());
  cast(waves.data(), DType::Float32, in.data(), dtype, waves.size());
  return in;
}

/// time(t) of these: Linear-SiLU-Linear, [count, D] float32.
Tensor time_embedding(const FlowHead& head, const Tensor& in) {
  const int64_t count = in.dim(0), width = head.time2.weight.dim(0);
  const Tensor hidden = scratch(in.dtype(), {count, width}), out = scratch(DType::Float32, {count, width});
  apply(head.time1, in, count, hidden, Activation::Silu);
  apply(head.time2, hidden, count, out);
  return out;
}

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
  norm(a);
}

void modulate(Workspace& w, const Rows& rows, const FlowBlock* block, const Tensor& modulation, int64_t parts, const Tensor* before) {
  modulated_norm(w, 0, rows.own, 1, block, modulation, parts, before);
  if (rows.free) modulated_norm(w, rows.own, rows.free, 0, block, modulation, parts, before);
}

/// w.velocity from w.x [rows.all, P] and w.y [rows.modulations, D].
void velocity(const FlowHead& head, Workspace& w, const Rows& rows) {
  apply(head.input, w.x, rows.all(), w.h);
  const Tensor* before = nullptr;
  for (size_t i = 0; i < head.blocks.size(); ++i) {
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

// --- integration --------------------------------------------------------------------------------------------------------

bool guided(const ops::FlowOptions& o) { return o.guidance != 1.0f; }

/// A group of rows, and where their condition and noise are put and their pixels are found.
struct Group {
  Group(const FlowHead& head, const ops::FlowOptions& o, int64_t count, DType dtype)
      : rows{count, guided(o) ? count : 0}, w(head, rows, dtype), x(scratch(DType::Float32, {count, w.pixels})) {
    const auto steps = static_cast<int64_t>(o.schedule.time.size());
    const Tensor t = to_device(o.schedule.time.data(), steps * size_of(DType::Float32));
    times = time_input(t.data<float>(), steps, dtype);
  }
  /// [rows, D], until the integration begins.
  const Tensor& condition() const { return w.u; }

  Rows rows;
  Workspace w;
  Tensor x;      // [rows, P] float32: noise, then pixels
  Tensor times;  // [steps, 256]
};

/// All steps of a group.
void integrate(const FlowHead& head, Group& g, const ops::FlowOptions& o, const CancelToken& token) {
  Workspace& w = g.w;
  const int64_t count = g.rows.own, p = w.pixels, d = w.width;
  const Tensor times = time_embedding(head, g.times);
  apply(head.condition, g.condition(), count, w.embedding);
  if (g.rows.free) copy(w.embedding.data<float>() + count * d, head.condition.bias.data(), d * size_of(DType::Float32));  // that of c = 0
  for (size_t step = 0; step < o.schedule.time.size(); ++step) {
    token.throw_if_cancelled();
    silu_sum(w.embedding.data<float>(), times.data<float>() + static_cast<int64_t>(step) * d, 0, w.y.data(), w.y.dtype(), g.rows.modulations(), d);
    for (int64_t at = 0; at < g.rows.all(); at += count)
      cast(g.x.data(), DType::Float32, w.x.data<std::byte>() + at * p * size_of(w.x.dtype()), w.x.dtype(), count * p);
    velocity(head, w, g.rows);
    const float* v = w.velocity.data<float>();
    euler(g.x.data<float>(), v, g.rows.free ? v + count * p : nullptr, o.guidance, o.schedule.step[step], count * p);
  }
}

/// Whatever a recorded group's kernels and their arguments follow from.
class Key {
 public:
  Key(const FlowHead& head, const ops::FlowOptions& o, int64_t rows, DType dtype) {
    values_ = {rows, static_cast<int64_t>(dtype), std::bit_cast<int32_t>(o.guidance)};
    for (const LinearLayer* l : {&head.time1, &head.time2, &head.condition, &head.input, &head.final_modulation, &head.output}) add(*l);
    for (const FlowBlock& b : head.blocks) {
      for (const LinearLayer* l : {&b.fc1, &b.fc2, &b.modulation}) add(*l);
      for (const Tensor* t : {&b.norm_weight, &b.norm_bias}) add(t->data());
    }
    for (const auto* list : {&o.schedule.time, &o.schedule.step})
      for (const float v : *list) values_.push_back(std::bit_cast<int32_t>(v));
  }
  bool operator==(const Key&) const = default;

 private:
  void add(const void* p) { values_.push_back(reinterpret_cast<intptr_t>(p)); }
  void add(const LinearLayer& layer) {
    add(layer.weight.data());
    add(layer.bias ? layer.bias.data() : nullptr);
    values_.insert(values_.end(), layer.weight.shape().begin(), layer.weight.shape().end());
    packings_.push_back(layer.weight.packing());
  }

  std::vector<int64_t> values_;
  std::vector<std::shared_ptr<const Packing>> packings_;  // kept, so that no other comes to the same address
};

/// A group that is launched as one, once its key has come a second time.
class FlowGraph {
 public:
  explicit FlowGraph(Key key) : key_(std::move(key)) {}
  const Key& key() const { return key_; }

  /// Runs a group: load(group) queues its condition and noise, store(group) takes its pixels.
  template <class Load, class Store>
  void run(const FlowHead& head, const ops::FlowOptions& o, int64_t rows, DType dtype, const CancelToken& token, Load&& load, Store&& store) {
    if (seen_ && !graph_ && recordable_ && static_cast<int64_t>(o.schedule.time.size() * (head.blocks.size() + 1)) <= kRecordedBlocks) {
      record(head, o, rows, dtype, token);
    }
    seen_ = true;
    if (graph_) {
      load(*group_);
      graph_->launch();
      return store(*group_);
    }
    Group group(head, o, rows, dtype);
    load(group);
    integrate(head, group, o, token);
    store(group);
  }

 private:
  /// Where there is no room for a graph and its memory, the group goes on without one.
  void record(const FlowHead& head, const ops::FlowOptions& o, int64_t rows, DType dtype, const CancelToken& token) {
    try {
      auto group = std::make_unique<Group>(head, o, rows, dtype);
      graph_ = std::make_unique<Graph>([&] { integrate(head, *group, o, token); });
      group_ = std::move(group);
    } catch (const Error& e) {
      if (e.code != ErrorCode::OutOfMemory) throw;
      recordable_ = false;
    }
  }

  Key key_;
  bool seen_ = false, recordable_ = true;
  std::unique_ptr<Group> group_;
  std::unique_ptr<Graph> graph_;
};

/// The graph of a key, the most recent of the head's few. They belong to the head: they go when its weights go. One thread feeds a device,
/// so none is in use elsewhere.
FlowGraph& graph_of(const FlowHead& head, Key key) {
  std::shared_ptr<void>& attached = head.input.weight.buffer()->attachment;
  if (!attached) attached = std::make_shared<std::list<FlowGraph>>();
  auto& graphs = *static_cast<std::list<FlowGraph>*>(attached.get());
  const auto found = std::ranges::find(graphs, key, &FlowGraph::key);
  if (found != graphs.end()) {
    graphs.splice(graphs.begin(), graphs, found);
  } else {
    graphs.emplace_front(std::move(key));
    if (graphs.size() > kGraphs) graphs.pop_back();
  }
  return graphs.front();
}

/// Rows [first, ...) of a [*, width] tensor.
const std::byte* row(const Tensor& t, int64_t first) { return t.data<std::byte>() + first * t.dim(-1) * size_of(t.dtype()); }

void load_group(Group& g, const Tensor& condition, const ops::FlowOptions& o, int64_t first, int64_t count) {
  copy(g.condition().data(), row(condition, first), count * condition.dim(-1) * size_of(condition.dtype()));
  if (o.noise) {
    copy(g.x.data(), row(o.noise, first), count * g.w.pixels * size_of(DType::Float32));
  } else {
    noise({.out = g.x.data<float>(), .first = first, .rows = count, .width = g.w.pixels, .patches = condition.dim(1), .seed = o.seed, .ids = o.ids.data()});
  }
}

void store_pixels(const Group& g, const Tensor& pixels, const ops::FlowOptions& o, int64_t first, int64_t count) {
  FoldArgs args{.patches = g.x.data<float>(), .pixels = pixels.data(), .pixel_dtype = pixels.dtype(), .first = first, .rows = count,
                .height = o.rows * o.patch, .width = o.cols * o.patch, .patch = o.patch, .mean = {}, .std = {}};
  std::copy(o.normalisation.mean.begin(), o.normalisation.mean.end(), args.mean);
  std::copy(o.normalisation.std.begin(), o.normalisation.std.end(), args.std);
  fold(args);
}

/// A thread makes a cosine and its sine, in double: the angle reaches 1000, where float32 has only 4 digits left.
__global__ void time_waves_kernel(const float* t, int64_t count, float* out) {
  constexpr int64_t half = kTimeChannels / 2;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, m = at / half, i = at % half;
  if (m >= count) return;
  const double angle = static_cast<double>(t[m]) * (1000.0 * exp(-log(10000.0) * static_cast<double>(i) / half));
  out[m * kTimeChannels + i] = static_cast<float>(cos(angle));
  out[m * kTimeChannels + half + i] = static_cast<float>(sin(angle));
}

}  // namespace

void time_waves(const float* t, int64_t count, float* out) {
  launch(time_waves_kernel, blocks_for(count * kTimeChannels / 2, 256), 256, 0, t, count, out);
}

void flow_integrate(const FlowHead& head, const Tensor& condition, const ops::FlowOptions& o, const Tensor& pixels, const CancelToken& token) {
  const int64_t total = condition.dim(0) * condition.dim(1), most = guided(o) ? kGroupRows / 2 : kGroupRows;
  if (total == 0) return;
  // Of equal size, so that they share a graph. The last may lack a few rows; what is left in their place from the group before does no harm.
  const int64_t groups = (total + most - 1) / most, size = (total + groups - 1) / groups;
  FlowGraph& graph = graph_of(head, Key(head, o, size, condition.dtype()));
  for (int64_t first = 0; first < total; first += size) {
    const int64_t count = std::min(size, total - first);
    token.throw_if_cancelled();
    graph.run(
        head, o, size, condition.dtype(), token, [&](Group& g) { load_group(g, condition, o, first, count); },
        [&](const Group& g) { store_pixels(g, pixels, o, first, count); });
  }
}

void flow_velocity(const FlowHead& head, const Tensor& x, const Tensor& t, const Tensor& condition, const Tensor& out) {
  const Rows rows{x.dim(0), 0};
  if (rows.own == 0) return;
  Workspace w(head, rows, condition.dtype());
  w.velocity = out;
  const Tensor times = time_embedding(head, time_input(t.data<float>(), rows.own, condition.dtype()));
  apply(head.condition, condition, rows.own, w.embedding);
  silu_sum(w.embedding.data<float>(), times.data<float>(), w.width, w.y.data(), w.y.dtype(), rows.own, w.width);
  cast(x.data(), DType::Float32, w.x.data(), w.x.dtype(), x.size());
  velocity(head, w, rows);
}

}  // namespace uniflow::cuda
