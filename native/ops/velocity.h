/// The flow head's layers over a group of rows, built from a device's kernels; shared by native/cpu/flow.cpp and native/cuda/flow.cu, which
/// differ in how they group the rows and launch a group's steps. Formula, shapes and FLOPs: native/ops/flow.h.
#pragma once

#include "native/ops/flow.h"
#include "native/ops/kernels.h"

namespace uniflow {

/// The device's kernels and scratch memory.
struct FlowDevice {
  const Kernels& kernels;
  Tensor (*scratch)(DType dtype, Shape shape);  // memory that is valid as long as the tensor
};

/// The rows of a group: `own` rows with their own condition and, for guidance, the same number of rows under the zero condition behind
/// them. The latter share one y, so one modulation row behind the others serves them all.
struct FlowRows {
  int64_t own, free;
  int64_t all() const { return own + free; }
  int64_t modulations() const { return own + (free > 0 ? 1 : 0); }
};

/// Working memory for one group of rows. Smaller groups fit as well.
struct FlowWorkspace {
  FlowWorkspace(const FlowDevice& device, const FlowHead& head, const FlowRows& rows, DType dtype);

  FlowDevice device;
  int64_t width, pixels;  // D, P
  Tensor embedding;       // condition(c), [modulations, D] float32
  Tensor y;               // silu(time + embedding), [modulations, D]
  Tensor x;               // [all, P]
  Tensor h;               // [all, D] float32
  Tensor u, hidden, branch;  // [all, D]
  Tensor velocity;        // [all, P] float32
  Tensor modulation[2];   // [modulations, 3 D] of this block and of the previous one, whose gate is applied with this block's norm
};

bool is_guided(const ops::FlowOptions& options);

/// Sinusoids of the times t [count] in the network's dtype: [count, 256].
Tensor time_input(const FlowDevice& device, const float* t, int64_t count, DType dtype);

/// time(t) of that input: Linear-SiLU-Linear, [count, D] float32.
Tensor time_embedding(const FlowDevice& device, const FlowHead& head, const Tensor& input);

/// Writes condition(c) of c [own, D] to w.embedding, followed for guidance by that of c = 0, which is the bias.
void embed_condition(const FlowHead& head, FlowWorkspace& w, const Tensor& condition, const FlowRows& rows);

/// Computes w.y from w.embedding and the time embedding: one for all rows (time_stride 0), or one per row (time_stride D).
void embed_time(FlowWorkspace& w, const FlowRows& rows, const float* time, int64_t time_stride);

/// Computes w.velocity from w.x and w.y. Throws Error (Aborted) between two blocks if the token is cancelled.
void velocity(const FlowHead& head, FlowWorkspace& w, const FlowRows& rows, const CancelToken* token = nullptr);

/// Step `step` of the schedule: x [own, P] float32 += dt * velocity, with guidance if the group has rows for it.
void euler_step(const FlowHead& head, FlowWorkspace& w, const FlowRows& rows, const Tensor& times, size_t step, const ops::FlowOptions& options,
                const Tensor& x, const CancelToken* token = nullptr);

/// Writes x [count, P] float32 to the pixels of patches [first, first + count).
void write_pixels(const FlowDevice& device, const Tensor& x, const Tensor& pixels, const ops::FlowOptions& options, int64_t first, int64_t count);

/// Rows [first, ...) of a [*, width] tensor.
const std::byte* rows_from(const Tensor& t, int64_t first);

}  // namespace uniflow
