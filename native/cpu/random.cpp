/// Noise for the flow, keyed by (seed, image, patch); see native/core/philox.h.
#include <algorithm>

#include "native/core/parallel.h"
#include "native/core/philox.h"
#include "native/cpu/kernels.h"

namespace uniflow::cpu::UNIFLOW_ISA {

void noise(const NoiseArgs& a) {
  parallel_for(a.rows, [&](int64_t r) {
    const int64_t at = a.first + r;
    const uint32_t patch = static_cast<uint32_t>(at % a.patches), image = a.ids[at / a.patches];
    float* out = a.out + r * a.width;
    for (int64_t i = 0; i < a.width; i += 4) {
      const auto four = philox_normal(philox({static_cast<uint32_t>(i / 4), patch, image, 0}, a.seed));
      std::copy_n(four.data(), std::min<int64_t>(4, a.width - i), out + i);
    }
  });
}

void draw(const DrawArgs& a) {
  parallel_for(a.images * a.patches, [&](int64_t i) {
    const PhiloxBlock block = philox({0, static_cast<uint32_t>(i % a.patches), a.ids[i / a.patches], 2}, a.seed);
    if (philox_uniform(block[2]) <= a.zero) a.out[i] = 0;
    else a.out[i] = a.logit_normal ? 1.0f / (1.0f + std::exp(-(a.mean + a.std * philox_normal(block)[0]))) : philox_uniform(block[0]);
  });
}

}  // namespace uniflow::cpu::UNIFLOW_ISA
