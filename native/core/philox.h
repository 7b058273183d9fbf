/// Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011). A number is a pure
/// function of key and counter, so the order of drawing does not matter.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define UNIFLOW_HOST_DEVICE __host__ __device__
#else
#define UNIFLOW_HOST_DEVICE
#endif

namespace uniflow {

using PhiloxBlock = std::array<uint32_t, 4>;

static constexpr PhiloxBlock philox(PhiloxBlock counter, uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * counter[0], p1 = uint64_t{0xCD9E8D57u} * counter[2];
    counter = {static_cast<uint32_t>(p1 >> 32) ^ counter[1] ^ k0, static_cast<uint32_t>(p1),
               static_cast<uint32_t>(p0 >> 32) ^ counter[3] ^ k1, static_cast<uint32_t>(p0)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return counter;
}

/// Uniform on (0, 1]: never 0, so its logarithm is finite.
static constexpr float philox_uniform(uint32_t bits) { return (static_cast<float>(bits >> 8) + 1.0f) * 0x1p-24f; }

/// Four standard normal numbers (Box-Muller) from one block.
UNIFLOW_HOST_DEVICE static inline std::array<float, 4> philox_normal(PhiloxBlock block) {
  std::array<float, 4> out;
  for (size_t i = 0; i < 4; i += 2) {
    const float radius = std::sqrt(-2.0f * std::log(philox_uniform(block[i])));
#ifdef __CUDA_ARCH__  // the library's path for large angles would cost registers and stack
    float sine, cosine;
    sincospif(2.0f * philox_uniform(block[i + 1]), &sine, &cosine);
#else
    const float angle = 6.28318530717958648f * philox_uniform(block[i + 1]), sine = std::sin(angle), cosine = std::cos(angle);
#endif
    out[i] = radius * cosine;
    out[i + 1] = radius * sine;
  }
  return out;
}

}  // namespace uniflow
