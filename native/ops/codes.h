/// Discrete codes by finite scalar quantisation (native/core/levels.h). Latents [..., Z] are groups of levels.size() channels, and each
/// group has one code: Z is a multiple of levels.size(). Bytes: every operand once.
#pragma once

#include "native/core/levels.h"
#include "native/ops/linear.h"

namespace uniflow::ops {

/// The constants of levels: from 2 to 256 each, at most 16 of them and a product of at most 65,536.
Levels levels_of(const std::vector<uint32_t>& levels);

Tensor fsq(const SessionRef& session, const Tensor& x, const std::vector<uint32_t>& levels);

/// The gradient of `fsq` as if it did not round (straight through): d_out * range * (1 - tanh(x + shift)^2) / half.
Tensor fsq_backward(const SessionRef& session, const Tensor& x, const Tensor& d_out, const std::vector<uint32_t>& levels);

/// The codes of quantised latents, [..., Z] -> int32 [..., Z / levels.size()]. Other latents have the code of the nearest ones.
Tensor latents_to_codes(const SessionRef& session, const Tensor& latents, const std::vector<uint32_t>& levels);

/// The latents of codes, int32 [..., G] -> float32 [..., G * levels.size()]. A code that does not exist fails the result.
Tensor codes_to_latents(const SessionRef& session, const Tensor& codes, const std::vector<uint32_t>& levels);

}  // namespace uniflow::ops
