/// AdamW with moving average and bfloat16 copy in one pass, and the reductions around it.
/// Roofline bound of adamw: parameter, m, v read and written, gradient read: 28 bytes per parameter (+ 8 for the average, + 2 for the
/// copy).
#include <cmath>
#include <vector>

#include "native/core/parallel.h"
#include "native/cpu/kernels.h"
#include "native/cpu/simd.h"

namespace uniflow::cpu::UNIFLOW_ISA {
namespace {

constexpr int64_t kChunk = 1 << 14;

int64_t chunks(int64_t n) { return (n + kChunk - 1) / kChunk; }

vf sqrt(vf x) {
  vf r;
  for (int i = 0; i < kWidth; ++i) r[i] = std::sqrt(x[i]);
  return r;
}

/// Sums body(begin, count) over chunks, in order.
template <class Body>
double ordered_sum(int64_t n, Body&& body) {
  std::vector<double> partial(static_cast<size_t>(chunks(n)));
  parallel_for(chunks(n), [&](int64_t c) {
    const int64_t begin = c * kChunk;
    partial[static_cast<size_t>(c)] = body(begin, begin + kChunk < n ? kChunk : n - begin);
  });
  double total = 0;
  for (double p : partial) total += p;
  return total;
}

double sum_of_squares(const float* x, int64_t n) {
  return ordered_sum(n, [&](int64_t begin, int64_t count) {
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
  parallel_for(chunks(p.n), [&](int64_t c) {
    const int64_t begin = c * kChunk, count = begin + kChunk < p.n ? kChunk : p.n - begin;
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

void mean_squared_error(const float* v, const float* target, float* grad, float* loss, int64_t n) {
  const float scale = 2.0f / static_cast<float>(n);
  const double total = ordered_sum(n, [&](int64_t begin, int64_t count) {
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

void adamw(const AdamWArgs& a) {
  const float norm = *a.norm;
  if (!std::isfinite(norm)) return;
  const float grad_scale = a.clip > 0 && norm > a.clip ? a.clip / (norm + 1e-6f) : 1.0f;
  for (int64_t i = 0; i < a.count; ++i) update(a, a.parameters[i], grad_scale);
}

}  // namespace uniflow::cpu::UNIFLOW_ISA
