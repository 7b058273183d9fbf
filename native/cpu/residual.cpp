/// Activations and residual connections, each with its backward pass. Memory-bound: every operand is read once and every result written
/// once; column sums are computed in the same pass.
///
/// Column sums add rows in groups of kRowsPerGroup, then the groups in order, so the result does not depend on the number of threads.
#include <vector>

#include "native/core/parallel.h"
#include "native/cpu/activation.h"
#include "native/cpu/column_sum.h"
#include "native/cpu/kernels.h"
#include "native/cpu/simd.h"

namespace uniflow::cpu::UNIFLOW_ISA {
namespace {

template <class T>
void activation_as(Activation kind, const void* x, void* out, int64_t n) {
  const T* in = static_cast<const T*>(x);
  T* o = static_cast<T*>(out);
  parallel_chunks(n, [&](int64_t begin, int64_t end) {
    for_lanes(end - begin, [&](int64_t i, int lanes) { store_lanes(o + begin + i, activate(kind, load_lanes(in + begin + i, lanes)), lanes); });
  });
}

template <class T>
void activation_backward_as(Activation kind, const void* x, const void* d_out, void* d_x, int64_t n) {
  const T *in = static_cast<const T*>(x), *d = static_cast<const T*>(d_out);
  T* o = static_cast<T*>(d_x);
  parallel_chunks(n, [&](int64_t begin, int64_t end) {
    for_lanes(end - begin, [&](int64_t i, int lanes) {
      store_lanes(o + begin + i, load_lanes(d + begin + i, lanes) * activate_derivative(kind, load_lanes(in + begin + i, lanes)), lanes);
    });
  });
}

template <class T>
void scale_add_as(const ScaleAddArgs& a) {
  parallel_for(a.rows, [&](int64_t r) {
    const T *h = static_cast<const T*>(a.residual) + r * a.width, *m = static_cast<const T*>(a.branch) + r * a.width;
    const T* gate = a.gate ? static_cast<const T*>(a.gate) + r * a.width : nullptr;
    T* out = static_cast<T*>(a.out) + r * a.width;
    for_lanes(a.width, [&](int64_t i, int lanes) {
      vf v = load_lanes(m + i, lanes);
      if (a.scale) v *= load_lanes(a.scale + i, lanes);
      if (gate) v *= load_lanes(gate + i, lanes);
      store_lanes(out + i, load_lanes(h + i, lanes) + v, lanes);
    });
  });
}

template <class T>
void scale_add_backward_as(const ScaleAddBackwardArgs& a) {
  ColumnSum scale_sum(a.d_scale, a.rows, a.width);
  parallel_for(row_groups(a.rows), [&](int64_t group) {
    float* partial = scale_sum.partial(group);
    for_rows(group, a.rows, [&](int64_t r) {
      const T *d = static_cast<const T*>(a.d_out) + r * a.width, *m = static_cast<const T*>(a.branch) + r * a.width;
      const T* gate = a.gate ? static_cast<const T*>(a.gate) + r * a.width : nullptr;
      T* d_branch = static_cast<T*>(a.d_branch) + r * a.width;
      T* d_gate = a.d_gate ? static_cast<T*>(a.d_gate) + r * a.width : nullptr;
      for_lanes(a.width, [&](int64_t i, int lanes) {
        const vf g = load_lanes(d + i, lanes), b = load_lanes(m + i, lanes);
        vf v = g;
        if (a.scale) v *= load_lanes(a.scale + i, lanes);
        if (gate) v *= load_lanes(gate + i, lanes);
        store_lanes(d_branch + i, v, lanes);
        if (d_gate) store_lanes(d_gate + i, g * b, lanes);
        if (partial) store_lanes(partial + i, load_lanes(partial + i, lanes) + g * b, lanes);
      });
    });
  });
  scale_sum.finish();
}

template <class T>
void swiglu_backward_as(const void* x, const void* d_out, void* d_x, int64_t rows, int64_t n) {
  parallel_for(rows, [&](int64_t r) {
    const T *gate = static_cast<const T*>(x) + r * 2 * n, *d = static_cast<const T*>(d_out) + r * n;
    T* o = static_cast<T*>(d_x) + r * 2 * n;
    for_lanes(n, [&](int64_t i, int lanes) {
      const vf g = load_lanes(gate + i, lanes), dy = load_lanes(d + i, lanes);
      store_lanes(o + i, dy * load_lanes(gate + n + i, lanes) * activate_derivative(Activation::Silu, g), lanes);
      store_lanes(o + n + i, dy * activate(Activation::Silu, g), lanes);
    });
  });
}

template <class T>
void add_as(const void* a, const void* b, const float* factor, float scale, void* out, int64_t n) {
  const T *x = static_cast<const T*>(a), *y = static_cast<const T*>(b);
  T* o = static_cast<T*>(out);
  const float f = factor ? *factor * scale : scale;
  parallel_chunks(n, [&](int64_t begin, int64_t end) {
    for_lanes(end - begin, [&](int64_t i, int lanes) {
      vf v = f * load_lanes(y + begin + i, lanes);
      if (x) v += load_lanes(x + begin + i, lanes);
      store_lanes(o + begin + i, v, lanes);
    });
  });
}

}  // namespace

void activation(Activation kind, const void* x, void* out, DType dtype, int64_t n) {
  dispatch_float(dtype, [&]<class T> { activation_as<T>(kind, x, out, n); });
}

void activation_backward(Activation kind, const void* x, const void* d_out, void* d_x, DType dtype, int64_t n) {
  dispatch_float(dtype, [&]<class T> { activation_backward_as<T>(kind, x, d_out, d_x, n); });
}

void scale_add(const ScaleAddArgs& a) {
  dispatch_float(a.dtype, [&]<class T> { scale_add_as<T>(a); });
}

void scale_add_backward(const ScaleAddBackwardArgs& a) {
  dispatch_float(a.dtype, [&]<class T> { scale_add_backward_as<T>(a); });
}

void swiglu_backward(const void* x, const void* d_out, void* d_x, DType dtype, int64_t rows, int64_t n) {
  dispatch_float(dtype, [&]<class T> { swiglu_backward_as<T>(x, d_out, d_x, rows, n); });
}

void add(const void* a, const void* b, const float* factor, float scale, void* out, DType dtype, int64_t n) {
  dispatch_float(dtype, [&]<class T> { add_as<T>(a, b, factor, scale, out, n); });
}

void column_sum(const void* x, float* out, DType dtype, int64_t rows, int64_t width) {
  ColumnSum total(out, rows, width);
  parallel_for(row_groups(rows), [&](int64_t group) {
    float* partial = total.partial(group);
    for_rows(group, rows, [&](int64_t r) {
      for_lanes(width, [&](int64_t i, int lanes) {
        const vf v = dtype == DType::BFloat16 ? load_lanes(static_cast<const bf16*>(x) + r * width + i, lanes)
                                              : load_lanes(static_cast<const float*>(x) + r * width + i, lanes);
        store_lanes(partial + i, load_lanes(partial + i, lanes) + v, lanes);
      });
    });
  });
  total.finish();
}

}  // namespace uniflow::cpu::UNIFLOW_ISA
