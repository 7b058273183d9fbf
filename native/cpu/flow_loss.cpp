/// The loss of rectified flow: the training pair, and the mean squared error with its gradient.
/// Roofline bound: both inputs read, the outputs written.
#include "native/cpu/chunks.h"
#include "native/cpu/kernels.h"

namespace uniflow::cpu::UNIFLOW_ISA {

void mean_squared_error(const float* v, const float* target, float* grad, float* loss, int64_t n) {
  const float scale = 2.0f / static_cast<float>(n);
  const double total = sum_over_chunks(n, [&](int64_t begin, int64_t count) {
    vf total = {};
    for_lanes(count, [&](int64_t i, int lanes) {
      const vf d = load_lanes(v + begin + i, lanes) - load_lanes(target + begin + i, lanes);
      total += d * d;
      if (grad) store_lanes(grad + begin + i, scale * d, lanes);
    });
    return static_cast<double>(sum(total));
  });
  *loss = static_cast<float>(total / static_cast<double>(n));
}

void interpolate(const float* data, const float* noise, const float* t, float* noisy, float* target, int64_t rows, int64_t width) {
  parallel_for(rows, [&](int64_t r) {
    const int64_t at = r * width;
    for_lanes(width, [&](int64_t i, int lanes) {
      const vf x = load_lanes(data + at + i, lanes), e = load_lanes(noise + at + i, lanes);
      store_lanes(noisy + at + i, t[r] * x + (1.0f - t[r]) * e, lanes);
      store_lanes(target + at + i, x - e, lanes);
    });
  });
}

}  // namespace uniflow::cpu::UNIFLOW_ISA
