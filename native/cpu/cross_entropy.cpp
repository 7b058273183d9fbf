/// Cross-entropy with one label per row: loss, gradient and hits. A row of logits stays in the first-level cache between the sweeps for its
/// maximum, its sum and its gradient, so memory is read once. Roofline bound: logits read, gradient written.
#include <cmath>
#include <vector>

#include "native/core/parallel.h"
#include "native/cpu/kernels.h"
#include "native/cpu/simd.h"

namespace uniflow::cpu::UNIFLOW_ISA {
namespace {

/// e^x for x <= 0 that keeps NaN, which the clamping of exp() would hide.
vf exp_of(vf x) { return x == x ? exp(x) : x; }

/// Zeroes the lanes from `lanes` on.
vf first_lanes(vf v, int lanes) {
  if (lanes == kWidth) return v;
  float values[kWidth];
  store(values, v);
  return load_tail(values, lanes);
}

template <class T>
float highest(const T* x, int64_t n) {
  vf top = splat(to_float(x[0]));
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) top = max(top, load(x + i));
  float m = max(top);
  for (; i < n; ++i) m = to_float(x[i]) > m ? to_float(x[i]) : m;
  return m;
}

/// Whether `label` is the first maximum.
template <class T>
bool is_hit(const T* x, int64_t label, float top) {
  bool first = to_float(x[label]) == top;
  for (int64_t i = 0; first && i < label; ++i) first = to_float(x[i]) != top;
  return first;
}

/// Returns -log softmax(x)[label]; grad = scale * (softmax(x) - onehot(label)).
template <class T>
double row(const T* x, T* grad, int64_t n, int64_t label, float top, float scale) {
  vf lanes_sum = {};
  for_lanes(n, [&](int64_t i, int lanes) {
    lanes_sum += first_lanes(exp_of(load_lanes(x + i, lanes) - top), lanes);
  });
  const float total = sum(lanes_sum), factor = scale / total;
  for_lanes(n, [&](int64_t i, int lanes) { store_lanes(grad + i, factor * exp_of(load_lanes(x + i, lanes) - top), lanes); });
  const float own = to_float(x[label]) - top, at_label = factor * std::exp(own) - scale;
  if constexpr (std::is_same_v<T, bf16>) grad[label] = to_bf16(at_label);
  else grad[label] = at_label;
  return std::log(double{total}) - own;
}

template <class T>
int64_t all_rows(const CrossEntropyArgs& a) {
  std::vector<double> losses(static_cast<size_t>(a.rows));
  std::vector<char> hits(static_cast<size_t>(a.rows)), bad(static_cast<size_t>(a.rows));
  const float scale = 1.0f / static_cast<float>(a.rows);
  parallel_for(a.rows, [&](int64_t r) {
    const int64_t label = a.labels[r], at = r * a.classes;
    const auto i = static_cast<size_t>(r);
    if (label < 0 || label >= a.classes) {
      bad[i] = 1;
      return;
    }
    const T* x = static_cast<const T*>(a.logits) + at;
    const float top = highest(x, a.classes);
    hits[i] = is_hit(x, label, top);
    losses[i] = row(x, static_cast<T*>(a.grad) + at, a.classes, label, top, scale);
  });
  double loss = 0;
  int64_t correct = 0, wrong_labels = 0;
  for (size_t i = 0; i < losses.size(); ++i) {
    loss += losses[i];
    correct += hits[i];
    wrong_labels += bad[i];
  }
  *a.loss = static_cast<float>(loss / static_cast<double>(a.rows));
  *a.correct = static_cast<float>(correct);
  return wrong_labels;
}

}  // namespace

int64_t cross_entropy(const CrossEntropyArgs& a) { return a.dtype == DType::BFloat16 ? all_rows<bf16>(a) : all_rows<float>(a); }

}  // namespace uniflow::cpu::UNIFLOW_ISA
