/// AdamW with moving average and bfloat16 copy in one pass, and the reductions around it.
/// Floor of adamw: parameter, m, v read and written, gradient read: 28 bytes a parameter (+ 8 for the average, + 2 for the copy).
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

}  // namespace

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

double mean_squared_error(const float* v, const float* target, float* grad, int64_t n) {
  const float scale = 2.0f / static_cast<float>(n);
  return ordered_sum(n, [&](int64_t begin, int64_t count) {
    vf total = {};
    for_lanes(count, [&](int64_t i, int lanes) {
      const vf d = load_lanes(v + begin + i, lanes) - load_lanes(target + begin + i, lanes);
      total += d * d;
      if (grad) store_lanes(grad + begin + i, scale * d, lanes);
    });
    return static_cast<double>(sum(total));
  }) / static_cast<double>(n);
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
  const float step = a.lr / a.correction1, root = 1.0f / std::sqrt(a.correction2), decay = 1.0f - a.lr * a.weight_decay;
  parallel_for(chunks(a.n), [&](int64_t c) {
    const int64_t begin = c * kChunk, count = begin + kChunk < a.n ? kChunk : a.n - begin;
    for_lanes(count, [&](int64_t k, int lanes) {
      const int64_t i = begin + k;
      const vf g = a.grad_scale * load_lanes(a.grad + i, lanes);
      const vf m = a.beta1 * load_lanes(a.m + i, lanes) + (1.0f - a.beta1) * g;
      const vf v = a.beta2 * load_lanes(a.v + i, lanes) + (1.0f - a.beta2) * g * g;
      const vf p = decay * load_lanes(a.parameter + i, lanes) - step * m / (root * sqrt(v) + a.eps);
      store_lanes(a.m + i, m, lanes);
      store_lanes(a.v + i, v, lanes);
      store_lanes(a.parameter + i, p, lanes);
      if (a.average) store_lanes(a.average + i, a.ema * load_lanes(a.average + i, lanes) + (1.0f - a.ema) * p, lanes);
      if (a.compute) store_lanes(static_cast<bf16*>(a.compute) + i, p, lanes);
    });
  });
}

}  // namespace uniflow::cpu::UNIFLOW_ISA
