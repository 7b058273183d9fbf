/// LayerNorm and RMSNorm, with AdaLN modulation and the gated residual before it, in one pass.
///
/// A row is loaded into a float32 buffer (first-level cache), its mean and variance are computed there in two sweeps (no cancellation), and
/// it is written once. Roofline bound: bytes of x (+ branch, gate, shift, scale) + out.
#include <cmath>
#include <vector>

#include "native/core/parallel.h"
#include "native/cpu/column_sum.h"
#include "native/cpu/kernels.h"
#include "native/cpu/simd.h"

namespace uniflow::cpu::UNIFLOW_ISA {
namespace {

constexpr int64_t kRowsPerTask = 16;

/// x_hat = ((x - near) - rest) * inverse_std. A mean summed in float32 is off by some parts in 10^7, which matters if the mean is large
/// compared to the deviation. But x - near is nearly exact, and so is its own mean.
struct Moments {
  float near, rest, inverse_std;

  vf normalise(vf x) const { return ((x - near) - rest) * inverse_std; }
};

Moments moments(const float* row, int64_t n, bool rms, float eps) {
  const float count = static_cast<float>(n);
  vf total = {};
  if (!rms) for_lanes(n, [&](int64_t i, int lanes) { total += load_lanes(row + i, lanes); });
  const float near = sum(total) / count;
  vf differences = {}, squares = {};
  for_lanes(n, [&](int64_t i, int lanes) {
    vf d = load_lanes(row + i, lanes) - near;
    if (lanes < kWidth)
      for (int k = lanes; k < kWidth; ++k) d[k] = 0;
    differences += d;
    squares += d * d;
  });
  const float rest = rms ? 0.0f : sum(differences) / count, variance = sum(squares) / count - rest * rest;
  return {near, rest, 1.0f / std::sqrt((variance > 0 ? variance : 0.0f) + eps)};
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
    vf v = m.normalise(load_lanes(row + i, lanes));
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

/// Backward pass of one row. With y = x_hat * weight + bias and out = y * (1 + scale) + shift: d_x = (d_x_hat - mean(d_x_hat) - x_hat *
/// mean(d_x_hat * x_hat)) / std, without the first mean for RMSNorm.
template <class T>
void norm_row_backward(const NormBackwardArgs& a, int64_t r, float* x_hat, float* d_x_hat, float* d_weight, float* d_bias) {
  const int64_t n = a.width;
  const T *x = static_cast<const T*>(a.x) + r * a.x_stride, *d_out = static_cast<const T*>(a.d_out) + r * a.d_stride;
  for_lanes(n, [&](int64_t i, int lanes) { store_lanes(x_hat + i, load_lanes(x + i, lanes), lanes); });
  const Moments m = moments(x_hat, n, a.rms, a.eps);
  vf total = {}, product = {};
  for_lanes(n, [&](int64_t i, int lanes) {
    const vf xh = m.normalise(load_lanes(x_hat + i, lanes)), g = load_lanes(d_out + i, lanes);
    const vf weight = a.weight ? load_lanes(a.weight + i, lanes) : splat(1.0f);
    vf d_y = g;
    if (a.scale) {
      const vf y = a.bias ? xh * weight + load_lanes(a.bias + i, lanes) : xh * weight;
      d_y = g * (load_lanes(static_cast<const T*>(a.scale) + r * n + i, lanes) + 1.0f);
      if (a.d_scale) store_lanes(static_cast<T*>(a.d_scale) + r * n + i, g * y, lanes);
      if (a.d_shift) store_lanes(static_cast<T*>(a.d_shift) + r * n + i, g, lanes);
    }
    if (d_weight) store_lanes(d_weight + i, load_lanes(d_weight + i, lanes) + d_y * xh, lanes);
    if (d_bias) store_lanes(d_bias + i, load_lanes(d_bias + i, lanes) + d_y, lanes);
    const vf d = d_y * weight;  // lanes past the end are zero, because d_out's are
    store_lanes(x_hat + i, xh, lanes);
    store_lanes(d_x_hat + i, d, lanes);
    total += d;
    product += d * xh;
  });
  const float mean = a.rms ? 0.0f : sum(total) / static_cast<float>(n), along = sum(product) / static_cast<float>(n);
  T* d_x = static_cast<T*>(a.d_x) + r * a.d_stride;
  for_lanes(n, [&](int64_t i, int lanes) {
    store_lanes(d_x + i, (load_lanes(d_x_hat + i, lanes) - mean - load_lanes(x_hat + i, lanes) * along) * m.inverse_std, lanes);
  });
}

template <class T>
void norm_rows_backward(const NormBackwardArgs& a) {
  ColumnSum weight_sum(a.d_weight, a.rows, a.width), bias_sum(a.d_bias, a.rows, a.width);
  parallel_for(row_groups(a.rows), [&](int64_t group) {
    thread_local std::vector<float> buffer;
    buffer.resize(static_cast<size_t>(2 * a.width));
    for_rows(group, a.rows, [&](int64_t r) {
      norm_row_backward<T>(a, r, buffer.data(), buffer.data() + a.width, weight_sum.partial(group), bias_sum.partial(group));
    });
  });
  weight_sum.finish();
  bias_sum.finish();
}

}  // namespace

void norm_backward(const NormBackwardArgs& a) {
  dispatch_float(a.dtype, [&]<class T> { norm_rows_backward<T>(a); });
}

void norm(const NormArgs& a) {
  const bool x16 = a.x_dtype == DType::BFloat16, y16 = a.out_dtype == DType::BFloat16;
  if (x16 && y16) norm_rows<bf16, bf16>(a);
  else if (x16) norm_rows<bf16, float>(a);
  else if (y16) norm_rows<float, bf16>(a);
  else norm_rows<float, float>(a);
}

}  // namespace uniflow::cpu::UNIFLOW_ISA
