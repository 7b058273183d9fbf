/// Patches are processed in groups of a few hundred rows. Each group passes through all steps and blocks before the next one, so its
/// activations stay in the caches (512 rows x (P + 10 D) values), while the weights, the same for every group, are streamed at 1/512 byte
/// per FLOP. The residual h and the pixels x are float32 throughout.
#include "native/cpu/flow.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "native/core/parallel.h"
#include "native/cpu/kernels.h"
#include "native/ops/velocity.h"

namespace uniflow::cpu {
namespace {

constexpr int64_t kGroupRows = 512;

FlowDevice here() {
  return {kernels(), [](DType dtype, Shape shape) {
            Tensor t(dtype, std::move(shape));
            t.buffer()->allocate();
            return t;
          }};
}

/// Writes the noise (random, or the caller's) of patches [first, first + rows) to x [rows, P].
void start(const Tensor& x, const ops::FlowOptions& o, int64_t first, int64_t rows, int64_t patches) {
  const int64_t p = x.dim(1);
  if (o.noise) std::memcpy(x.data(), rows_from(o.noise, first), static_cast<size_t>(rows * p) * sizeof(float));
  else kernels().noise({.out = x.data<float>(), .first = first, .rows = rows, .width = p, .patches = patches, .seed = o.seed, .ids = o.ids.data()});
}

}  // namespace

void timestep_embedding(const float* t, int64_t count, float* out) {
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
  const bool guided = is_guided(o);
  const int64_t patches = condition.dim(1), total = condition.dim(0) * patches, group = std::min(total, guided ? kGroupRows / 2 : kGroupRows);
  const FlowDevice device = here();
  const auto steps = static_cast<int64_t>(o.schedule.time.size());
  const Tensor times = time_embedding(device, head, time_input(device, o.schedule.time.data(), steps, condition.dtype()));
  FlowWorkspace w(device, head, {group, guided ? group : 0}, condition.dtype());
  Tensor x = device.scratch(DType::Float32, {group, w.pixels});
  const Tensor conditions = condition.reshape({total, w.width});
  for (int64_t first = 0; first < total; first += group) {
    const FlowRows rows{std::min(group, total - first), guided ? std::min(group, total - first) : 0};
    start(x, o, first, rows.own, patches);
    embed_condition(head, w, conditions.slice(first, first + rows.own), rows);
    for (size_t step = 0; step < o.schedule.time.size(); ++step) euler_step(head, w, rows, times, step, o, x, &token);
    write_pixels(device, x, pixels, o, first, rows.own);
  }
}

void flow_velocity(const FlowHead& head, const Tensor& x, const Tensor& t, const Tensor& condition, const Tensor& out) {
  const FlowDevice device = here();
  const FlowRows rows{x.dim(0), 0};
  FlowWorkspace w(device, head, rows, condition.dtype());
  w.velocity = out;
  embed_condition(head, w, condition, rows);
  embed_time(w, rows, time_embedding(device, head, time_input(device, t.data<float>(), rows.own, condition.dtype())).data<float>(), w.width);
  kernels().cast(x.data(), DType::Float32, w.x.data(), w.x.dtype(), x.size());
  velocity(head, w, rows);
}

}  // namespace uniflow::cpu
