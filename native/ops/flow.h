/// The patch-wise pixel flow: an AdaLN-MLP velocity field, integrated from noise (t = 0) to pixels (t = 1).
///
/// Paper: UniFlow, patch-wise pixel flow decoder; checkpoint names `flow_head.net.*`. Patches are independent:
///   y = silu(time(t) + condition(c));  h = input(x);
///   per block: shift, scale, gate = modulation(y);  h += gate * fc2(silu(fc1(LN(h) * (1 + scale) + shift)));
///   v = output(LN(h) * (1 + scale) + shift);  x += dt * v.
/// FLOPs per patch and step: 2 * (2*P*D + blocks*5*D*D + 2*D*D); once per patch: 2*D*D. D is the width, P = 3*p*p. Guidance adds 2 * (2*P*D
/// + blocks*2*D*D) per patch and step: under the zero condition all patches share their modulations.
#pragma once

#include <vector>

#include "native/ops/patch.h"

namespace uniflow {

/// Size of the timestep embedding's sinusoids.
constexpr int64_t kTimeChannels = 256;

struct LinearLayer {
  Tensor weight;  // [out, in] packed
  Tensor bias;    // [out] float32
};

struct FlowBlock {
  Tensor norm_weight, norm_bias;  // [D] float32
  LinearLayer fc1, fc2;           // [D, D]
  LinearLayer modulation;         // [3*D, D]: shift, scale, gate
};

struct FlowHead {
  LinearLayer time1, time2;  // [D, 256], [D, D]
  LinearLayer condition;     // [D, D]
  LinearLayer input;         // [D, P]
  std::vector<FlowBlock> blocks;
  LinearLayer final_modulation;  // [2*D, D]: shift, scale
  LinearLayer output;            // [P, D]
};

namespace ops {

/// Euler integration: step k starts at time[k] and has length step[k].
struct FlowSchedule {
  std::vector<float> time, step;
};

struct FlowOptions {
  FlowSchedule schedule;
  float guidance = 1.0f;  // v = v0 + guidance * (v - v0), v0 under a zero condition; 1: skips v0
  Tensor noise;           // [B, N, P] float32; empty: drawn from (seed, ids[image], patch)
  uint64_t seed = 0;
  std::vector<uint32_t> ids;  // one per image
  int64_t rows = 0, cols = 0, patch = 0;
  Normalisation normalisation{};
  DType pixel_dtype = DType::UInt8;  // of the result
};

/// condition [B, N, D] -> pixels: uint8 [B, H, W, 3], or float32 [B, 3, H, W] normalised.
Tensor flow_integrate(const SessionRef& session, const FlowHead& head, const Tensor& condition, const FlowOptions& options);

/// Velocity of each patch at its own time: x [M, P] float32, t [M] float32, condition [M, D] -> [M, P] float32.
Tensor flow_velocity(const SessionRef& session, const FlowHead& head, const Tensor& x, const Tensor& t, const Tensor& condition);

/// Sinusoidal timestep embedding of 1000 t in 256 channels, cosines first. t [M] -> [M, 256] float32.
Tensor timestep_embedding(const SessionRef& session, const Tensor& t);

/// Uniform on (0, 1] [B, N] float32, a function of (seed, ids[image], patch).
Tensor uniform(const SessionRef& session, uint64_t seed, const std::vector<uint32_t>& ids, int64_t patches);

/// sigmoid(mean + std * n), n standard normal, or exactly 0 with probability `zero`: [B, N] float32, a function of (seed, ids[image], patch).
Tensor logit_normal(const SessionRef& session, uint64_t seed, const std::vector<uint32_t>& ids, int64_t patches, float mean, float std, float zero);

/// Standard normal [B, N, P] float32, a function of (seed, ids[image], patch) alone.
Tensor noise(const SessionRef& session, uint64_t seed, const std::vector<uint32_t>& ids, int64_t patches, int64_t width);

}  // namespace ops
}  // namespace uniflow
