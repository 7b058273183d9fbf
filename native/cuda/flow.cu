/// The flow head: the algorithm of native/cpu/flow.cpp on a GPU, from the same layers (native/ops/velocity.h).
///
/// Patches are processed in equal groups of up to 8192 rows; each group passes through all steps and blocks before the next one. That many
/// rows give a product enough tiles to keep every multiprocessor busy (256 of 128 x 256 at a width of 1024). With more rows, the data
/// passed from one kernel to the next (16 MiB in bfloat16) would no longer fit in the second-level cache. Roofline bound: FLOPs.
///
/// A group's kernels are the same whenever the weights, the rows and the schedule are the same. They are recorded as a Graph and launched
/// together, because with the few rows of a single image each kernel takes less time than its launch. The first group of a key is not
/// recorded: it lets linear() time its algorithms, and many keys occur only once.
#include <algorithm>
#include <bit>
#include <cmath>
#include <list>

#include "native/core/command.h"
#include "native/cuda/device.cuh"
#include "native/cuda/kernels.h"
#include "native/ops/velocity.h"

namespace uniflow::cuda {
namespace {

constexpr int64_t kGroupRows = 8192;
constexpr int64_t kRecordedBlocks = 1024;  // steps x blocks of a graph: some thousand kernels
constexpr size_t kGraphs = 4;              // number of graphs kept, each with the memory of its group

FlowDevice here() { return {kernels(), scratch}; }

void copy(void* to, const void* from, int64_t bytes) {
  check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, stream()), "cudaMemcpyAsync");
}

/// A group of rows, with the tensors for their condition, noise and pixels.
struct Group {
  Group(const FlowHead& head, const ops::FlowOptions& o, int64_t count, DType dtype)
      : rows{count, is_guided(o) ? count : 0}, w(here(), head, rows, dtype), x(scratch(DType::Float32, {count, w.pixels})) {
    const auto steps = static_cast<int64_t>(o.schedule.time.size());
    const Tensor t = to_device(o.schedule.time.data(), steps * size_of(DType::Float32));
    times = time_input(w.device, t.data<float>(), steps, dtype);
  }
  /// [rows, D], valid until the integration begins.
  const Tensor& condition() const { return w.u; }

  FlowRows rows;
  FlowWorkspace w;
  Tensor x;      // [rows, P] float32: noise, then pixels
  Tensor times;  // [steps, 256]
};

/// Runs all steps of a group.
void integrate(const FlowHead& head, Group& g, const ops::FlowOptions& o, const CancelToken& token) {
  const Tensor times = time_embedding(g.w.device, head, g.times);
  embed_condition(head, g.w, g.condition(), g.rows);
  for (size_t step = 0; step < o.schedule.time.size(); ++step) {
    token.throw_if_cancelled();
    euler_step(head, g.w, g.rows, times, step, o, g.x);
  }
}

/// Everything that determines a recorded group's kernels and their arguments.
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
  std::vector<std::shared_ptr<const Packing>> packings_;  // kept alive, so no other packing can get the same address
};

/// A group that is recorded and launched as one graph, once its key occurs a second time.
class FlowGraph {
 public:
  explicit FlowGraph(Key key) : key_(std::move(key)) {}
  const Key& key() const { return key_; }

  /// Runs a group: load(group) queues its condition and noise, store(group) reads its pixels.
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
  /// If there is no memory for a graph, the group runs without one.
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

/// The graph of a key, from the head's few most recent ones. Graphs belong to the head and are freed with its weights. Only one thread
/// feeds a device, so no graph is in use elsewhere.
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

/// Rows [count, rows) of x set to zero: a short last group computes them too, from memory that may never have been written.
void clear_rows(const Tensor& x, int64_t count) {
  const int64_t row = x.dim(-1) * size_of(x.dtype());
  copy_rows(x.data<std::byte>() + count * row, row, nullptr, 0, row, x.dim(0) - count);
}

void load_group(Group& g, const Tensor& condition, const ops::FlowOptions& o, int64_t first, int64_t count) {
  copy(g.condition().data(), rows_from(condition, first), count * condition.dim(-1) * size_of(condition.dtype()));
  if (o.noise) {
    copy(g.x.data(), rows_from(o.noise, first), count * g.w.pixels * size_of(DType::Float32));
  } else {
    noise({.out = g.x.data<float>(), .first = first, .rows = count, .width = g.w.pixels, .patches = condition.dim(1), .seed = o.seed, .ids = o.ids.data()});
  }
  if (count == g.rows.own) return;
  clear_rows(g.condition(), count);
  clear_rows(g.x, count);
}

/// A thread computes a cosine and its sine, in double: the angle reaches 1000, where float32 has only 4 digits left.
__global__ void timestep_embedding_kernel(const float* t, int64_t count, float* out) {
  constexpr int64_t half = kTimeChannels / 2;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, m = at / half, i = at % half;
  if (m >= count) return;
  const double angle = static_cast<double>(t[m]) * (1000.0 * exp(-log(10000.0) * static_cast<double>(i) / half));
  out[m * kTimeChannels + i] = static_cast<float>(cos(angle));
  out[m * kTimeChannels + half + i] = static_cast<float>(sin(angle));
}

}  // namespace

void timestep_embedding(const float* t, int64_t count, float* out) {
  launch(timestep_embedding_kernel, blocks_for(count * kTimeChannels / 2, 256), 256, 0, t, count, out);
}

void flow_integrate(const FlowHead& head, const Tensor& condition, const ops::FlowOptions& o, const Tensor& pixels, const CancelToken& token) {
  const int64_t total = condition.dim(0) * condition.dim(1), most = is_guided(o) ? kGroupRows / 2 : kGroupRows;
  if (total == 0) return;
  // Equal sizes, so that groups share a graph. The last may have a few rows less.
  const int64_t groups = (total + most - 1) / most, size = (total + groups - 1) / groups;
  FlowGraph& graph = graph_of(head, Key(head, o, size, condition.dtype()));
  for (int64_t first = 0; first < total; first += size) {
    const int64_t count = std::min(size, total - first);
    token.throw_if_cancelled();
    graph.run(
        head, o, size, condition.dtype(), token, [&](Group& g) { load_group(g, condition, o, first, count); },
        [&](const Group& g) { write_pixels(g.w.device, g.x, pixels, o, first, count); });
  }
}

void flow_velocity(const FlowHead& head, const Tensor& x, const Tensor& t, const Tensor& condition, const Tensor& out) {
  const FlowRows rows{x.dim(0), 0};
  if (rows.own == 0) return;
  FlowWorkspace w(here(), head, rows, condition.dtype());
  w.velocity = out;
  embed_condition(head, w, condition, rows);
  embed_time(w, rows, time_embedding(w.device, head, time_input(w.device, t.data<float>(), rows.own, condition.dtype())).data<float>(), w.width);
  cast(x.data(), DType::Float32, w.x.data(), w.x.dtype(), x.size());
  velocity(head, w, rows);
}

}  // namespace uniflow::cuda
