/// The flow head on the CPU. Contract and shapes: native/ops/flow.h.
#pragma once

#include "native/ops/flow.h"

namespace uniflow::cpu {

/// t [count] -> [count, 256]: cosines, then sines, of 1000 t * 10000^(-i/128).
void timestep_embedding(const float* t, int64_t count, float* out);

void flow_integrate(const FlowHead& head, const Tensor& condition, const ops::FlowOptions& options, const Tensor& pixels,
                    const CancelToken& token);

void flow_velocity(const FlowHead& head, const Tensor& x, const Tensor& t, const Tensor& condition, const Tensor& velocity);

}  // namespace uniflow::cpu
