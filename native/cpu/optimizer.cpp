/// AdamW with moving average and bfloat16 copy in one pass, and the gradients' norm.
/// Roofline bound of adamw: parameter, m, v read and written, gradient read: 28 bytes per parameter (+ 8 for the average, + 2 for the
/// copy).
#include <cmath>

#include "native/cpu/chunks.h"
#include "native/cpu/kernels.h"

namespace uniflow::cpu::UNIFLOW_ISA {
namespace {

vf sqrt(vf x) {
  vf r;
  for (int i = 0; i < kWidth; ++i) r[i] = std::sqrt(x[i]);
  return r;
}

double sum_of_squares(const float* x, int64_t n) {
  return sum_over_chunks(n, [&](int64_t begin, int64_t count) {
    vf total = {};
    for_lanes(count, [&](int64_t i, int lanes) {
      const vf v = load_lanes(x + begin + i, lanes);
      total += v * v;
    });
    return static_cast<double>(sum(total));
  });
}

/// One step for one tensor.
void update(const AdamWArgs& a, const AdamWParameter& p, float grad_scale) {
  const float step = p.lr / a.correction1, root = 1.0f / std::sqrt(a.correction2), decay = 1.0f - p.lr * p.weight_decay;
  for_chunks(p.n, [&](int64_t begin, int64_t count) {
    for_lanes(count, [&](int64_t k, int lanes) {
      const int64_t i = begin + k;
      const vf g = grad_scale * load_lanes(p.grad + i, lanes);
      const vf m = a.beta1 * load_lanes(p.m + i, lanes) + (1.0f - a.beta1) * g;
      const vf v = a.beta2 * load_lanes(p.v + i, lanes) + (1.0f - a.beta2) * g * g;
      const vf value = decay * load_lanes(p.parameter + i, lanes) - step * m / (root * sqrt(v) + a.eps);
      store_lanes(p.m + i, m, lanes);
      store_lanes(p.v + i, v, lanes);
      store_lanes(p.parameter + i, value, lanes);
      if (p.average) store_lanes(p.average + i, a.ema * load_lanes(p.average + i, lanes) + (1.0f - a.ema) * value, lanes);
      if (p.compute) store_lanes(static_cast<bf16*>(p.compute) + i, value, lanes);
    });
  });
}

}  // namespace

void global_norm(const float* const* x, const int64_t* n, int64_t count, float* out) {
  double total = 0;
  for (int64_t i = 0; i < count; ++i) total += sum_of_squares(x[i], n[i]);
  *out = static_cast<float>(std::sqrt(total));
}

void adamw(const AdamWArgs& a) {
  const float norm = *a.norm;
  if (!std::isfinite(norm)) return;
  const float grad_scale = a.clip > 0 && norm > a.clip ? a.clip / (norm + 1e-6f) : 1.0f;
  for (int64_t i = 0; i < a.count; ++i) update(a, a.parameters[i], grad_scale);
}

}  // namespace uniflow::cpu::UNIFLOW_ISA
