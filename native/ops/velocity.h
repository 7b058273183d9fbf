/// The flow head's layers over a group of rows, made of a device's kernels: what native/cpu/flow.cpp and native/cuda/flow.cu share. They
/// differ in how they group the rows and how the steps of a group are launched. Formula, shapes and FLOPs: native/ops/flow.h.
#pragma once

#include "native/ops/flow.h"
#include "native/ops/kernels.h"

namespace uniflow {

/// What a device computes with.
struct FlowDevice {
  const Kernels& kernels;
  Tensor (*scratch)(DType dtype, Shape shape);  // memory for as long as the tensor lives
};

/// The rows of a group: those with a condition of their own, and behind them, for guidance, as many under the zero
/// condition. These all have one y, so their modulations are one row too, behind the others'.
struct FlowRows {
  int64_t own, free;
  int64_t all() const { return own + free; }
  int64_t modulations() const { return own + (free > 0 ? 1 : 0); }
};

/// What one group of rows needs on its way through the network. Groups of fewer rows fit in as well.
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
  Tensor modulation[2];   // [modulations, 3 D] of this block and of the one before, whose gate is applied with this block's norm
};

bool is_guided(const ops::FlowOptions& options);

/// Sinusoids of the times t [count] in the type of the network: [count, 256].
Tensor time_input(const FlowDevice& device, const float* t, int64_t count, DType dtype);

/// time(t) of these: Linear-SiLU-Linear, [count, D] float32.
Tensor time_embedding(const FlowDevice& device, const FlowHead& head, const Tensor& input);

/// condition(c) of c [own, D] into w.embedding; behind it, for guidance, that of c = 0, which is the bias.
void embed_condition(const FlowHead& head, FlowWorkspace& w, const Tensor& condition, const FlowRows& rows);

/// w.y from w.embedding and the embedding of the times: of one for all rows (time_stride 0), or of one for each (D).
void embed_time(FlowWorkspace& w, const FlowRows& rows, const float* time, int64_t time_stride);

/// w.velocity from w.x and w.y. Throws Error (Aborted) between two blocks, where there is a token.
void velocity(const FlowHead& head, FlowWorkspace& w, const FlowRows& rows, const CancelToken* token = nullptr);

/// Step number `step` of the schedule: x [own, P] float32 += dt * velocity, guided where there are rows for it.
void euler_step(const FlowHead& head, FlowWorkspace& w, const FlowRows& rows, const Tensor& times, size_t step, const ops::FlowOptions& options,
                const Tensor& x, const CancelToken* token = nullptr);

/// x [count, P] float32 to the pixels of patches [first, first + count).
void write_pixels(const FlowDevice& device, const Tensor& x, const Tensor& pixels, const ops::FlowOptions& options, int64_t first, int64_t count);

/// Rows [first, ...) of a [*, width] tensor.
const std::byte* rows_from(const Tensor& t, int64_t first);

}  // namespace uniflow
