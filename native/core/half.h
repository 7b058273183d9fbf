/// float16 as a storage format; nothing is computed in it.
#pragma once

#include <bit>
#include <cstdint>

namespace uniflow {

/// Exact, subnormals and infinities included.
constexpr float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 0x3ffu;
  if (exponent == 0) return std::bit_cast<float>(sign | 0x3f800000u) * static_cast<float>(mantissa) * 0x1p-24f;
  const uint32_t wide = exponent == 31 ? 255u : exponent + 112u;
  return std::bit_cast<float>(sign | (wide << 23) | (mantissa << 13));
}

/// Whether float_to_half can represent it: 65520 and above would round to infinity.
constexpr bool fits_half(float v) { return (std::bit_cast<uint32_t>(v) & 0x7fffffffu) < 0x477ff000u; }

/// Rounds to nearest, ties to even. The value must fit.
constexpr uint16_t float_to_half(float v) {
  constexpr uint32_t kSmallestNormal = 0x38800000u;  // 2^-14
  const uint32_t bits = std::bit_cast<uint32_t>(v), magnitude = bits & 0x7fffffffu;
  // Next to 0.5, the last bit of a float32 is worth 2^-24, as in a subnormal half, so the addition rounds correctly.
  const uint32_t small = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  return static_cast<uint16_t>(((bits >> 16) & 0x8000u) | (magnitude < kSmallestNormal ? small : normal));
}

}  // namespace uniflow
