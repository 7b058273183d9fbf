/// Layer-wise cosine distillation, loss and gradient in one pass over student and teacher.
///
/// Per token: dot = s.t, |s|, |t|, then d(1 - cos)/ds = -(t/|t| - cos * s/|s|) / |s|. A row of s and t stays in the first-level cache
/// between the two sweeps, so memory is read once. Roofline bound: bytes of both stacks read + the gradient written.
#include <cmath>
#include <vector>

#include "native/core/parallel.h"
#include "native/cpu/kernels.h"
#include "native/cpu/simd.h"

namespace uniflow::cpu::UNIFLOW_ISA {
namespace {

constexpr float kLive = 1e-8f;  // a token with a norm up to this has cosine 0 and no gradient
constexpr int64_t kRowsPerTask = 32;

/// Returns 1 - cosine; writes its gradient times `scale`.
template <class T>
float token(const T* s, const T* t, T* grad, int64_t width, float scale) {
  vf dot = {}, ss = {}, tt = {};
  for_lanes(width, [&](int64_t i, int lanes) {
    const vf a = load_lanes(s + i, lanes), b = load_lanes(t + i, lanes);
    dot += a * b;
    ss += a * a;
    tt += b * b;
  });
  const float student = std::sqrt(sum(ss)), teacher = std::sqrt(sum(tt));
  const bool live = student > kLive && teacher > kLive;
  const float cosine = live ? sum(dot) / (student * teacher) : 0.0f;
  if (grad) {
    const float along_t = live ? -scale / (student * teacher) : 0.0f, along_s = live ? scale * cosine / (student * student) : 0.0f;
    for_lanes(width, [&](int64_t i, int lanes) {
      store_lanes(grad + i, along_t * load_lanes(t + i, lanes) + along_s * load_lanes(s + i, lanes), lanes);
    });
  }
  return 1.0f - cosine;
}

/// Returns alpha of layer l and writes its gradient.
template <class T>
float layer(const DistillationArgs& a, int64_t l) {
  const int64_t compared = a.tokens - a.skip, rows = a.batch * a.tokens, tasks = (rows + kRowsPerTask - 1) / kRowsPerTask;
  const float scale = 1.0f / static_cast<float>(a.batch * compared);
  std::vector<float> partial(static_cast<size_t>(tasks));
  parallel_for(tasks, [&](int64_t task) {
    float total = 0;
    for (int64_t r = task * kRowsPerTask; r < rows && r < (task + 1) * kRowsPerTask; ++r) {
      const T *s = static_cast<const T*>(a.student[l]) + r * a.width, *t = static_cast<const T*>(a.teacher[l]) + r * a.width;
      T* grad = a.grad ? static_cast<T*>(a.grad[l]) + r * a.width : nullptr;
      if (r % a.tokens >= a.skip) total += token(s, t, grad, a.width, scale);
      else if (grad) std::memset(static_cast<void*>(grad), 0, static_cast<size_t>(a.width) * sizeof(T));
    }
    partial[static_cast<size_t>(task)] = total;
  });
  double alpha = 0;
  for (float p : partial) alpha += p;
  return static_cast<float>(alpha * scale);
}

/// w_l before normalisation, in double because exp(beta alpha) spans orders of magnitude.
double layer_weight(const DistillationArgs& a, int64_t l) {
  if (a.weights == LayerWeights::Uniform) return 1;
  if (a.weights == LayerWeights::Last) return l + 1 == a.layers ? 1 : 0;
  return static_cast<double>(l + 1) / static_cast<double>(a.layers) * std::exp(static_cast<double>(a.beta) * a.alpha[l]);
}

}  // namespace

void distillation(const DistillationArgs& a) {
  double total = 0, loss = 0;
  for (int64_t l = 0; l < a.layers; ++l) {
    a.alpha[l] = a.dtype == DType::BFloat16 ? layer<bf16>(a, l) : layer<float>(a, l);
    total += layer_weight(a, l);
  }
  for (int64_t l = 0; l < a.layers; ++l) {
    const double weight = layer_weight(a, l) / total;
    a.weight[l] = static_cast<float>(weight);
    loss += weight * a.alpha[l];
  }
  *a.loss = static_cast<float>(loss);
}

}  // namespace uniflow::cpu::UNIFLOW_ISA
