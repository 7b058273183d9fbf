/// LayerNorm and RMSNorm, with AdaLN modulation and the gated residual before it, in one pass.
///
/// A row is brought into a float32 buffer (first-level cache), its mean and variance are taken there in
/// two sweeps (no cancellation), and it is written once. Floor: bytes of x (+ branch, gate, shift, scale) + out.
#include <cmath>
#include <vector>

#include "native/core/parallel.h"
#include "native/cpu/kernels.h"
#include "native/cpu/simd.h"

namespace uniflow::cpu::UNIFLOW_ISA {
namespace {

constexpr int64_t kRowsPerTask = 16;

struct Moments {
  float mean, inverse_std;
};

Moments moments(const float* row, int64_t n, bool rms, float eps) {
  vf total = {};
  if (!rms) {
    for_lanes(n, [&](int64_t i, int lanes) { total += load_lanes(row + i, lanes); });
  }
  const float mean = sum(total) / static_cast<float>(n);
  vf squares = {};
  for_lanes(n, [&](int64_t i, int lanes) {
    vf d = load_lanes(row + i, lanes) - mean;
    if (lanes < kWidth)
      for (int k = lanes; k < kWidth; ++k) d[k] = 0;
    squares += d * d;
  });
  return {mean, 1.0f / std::sqrt(sum(squares) / static_cast<float>(n) + eps)};
}

template <class X, class Y>
void norm_row(const NormArgs& a, int64_t r, float* row) {
  const int64_t n = a.width;
  if (a.residual) {
    float* h = a.residual + r * n;
    const Y* branch = static_cast<const Y*>(a.branch) + r * n;
    const Y* gate = static_cast<const Y*>(a.gate) + r * a.gate_stride;
    for_lanes(n, [&](int64_t i, int lanes) {
      vf v = load_lanes(h + i, lanes);
      if (a.branch) {
        v += load_lanes(gate + i, lanes) * load_lanes(branch + i, lanes);
        store_lanes(h + i, v, lanes);
      }
      store_lanes(row + i, v, lanes);
    });
  } else {
    const X* x = static_cast<const X*>(a.x) + r * a.x_stride;
    for_lanes(n, [&](int64_t i, int lanes) { store_lanes(row + i, load_lanes(x + i, lanes), lanes); });
  }
  const Moments m = moments(row, n, a.rms, a.eps);
  Y* out = static_cast<Y*>(a.out) + r * a.out_stride;
  const Y* shift = static_cast<const Y*>(a.shift) + r * a.modulation_stride;
  const Y* scale = static_cast<const Y*>(a.scale) + r * a.modulation_stride;
  for_lanes(n, [&](int64_t i, int lanes) {
    vf v = (load_lanes(row + i, lanes) - m.mean) * m.inverse_std;
    if (a.weight) v *= load_lanes(a.weight + i, lanes);
    if (a.bias) v += load_lanes(a.bias + i, lanes);
    if (a.scale) v = v * (load_lanes(scale + i, lanes) + 1.0f) + load_lanes(shift + i, lanes);
    store_lanes(out + i, v, lanes);
  });
}

template <class X, class Y>
void norm_rows(const NormArgs& a) {
  parallel_for((a.rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
    thread_local std::vector<float> row;
    row.resize(static_cast<size_t>(a.width));
    const int64_t end = (task + 1) * kRowsPerTask < a.rows ? (task + 1) * kRowsPerTask : a.rows;
    for (int64_t r = task * kRowsPerTask; r < end; ++r) norm_row<X, Y>(a, r, row.data());
  });
}

}  // namespace

void norm(const NormArgs& a) {
  const bool x16 = a.x_dtype == DType::BFloat16, y16 = a.out_dtype == DType::BFloat16;
  if (x16 && y16) norm_rows<bf16, bf16>(a);
  else if (x16) norm_rows<bf16, float>(a);
  else if (y16) norm_rows<float, bf16>(a);
  else norm_rows<float, float>(a);
}

}  // namespace uniflow::cpu::UNIFLOW_ISA
