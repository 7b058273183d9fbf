/// Activations and residual connections, each with its backward pass.
///
/// A thread has 16 bytes of the elements of one or two rows. If a column sum is computed in the same pass, a block has a tile of columns
/// and a group of rows (column_sum.cuh). Memory-bound: every operand is read once and every result written once.
#include "native/cuda/activation.cuh"
#include "native/cuda/column_sum.cuh"
#include "native/cuda/kernels.h"

namespace uniflow::cuda {
namespace {

template <Activation K, class T>
struct Activate {
  const T* x;
  T* out;

  template <int N>
  __device__ void at(int64_t i) const {
    float v[N];
    load<N>(x + i, v);
#pragma unroll
    for (int k = 0; k < N; ++k) v[k] = activate<K>(v[k]);
    store<N>(out + i, v);
  }
};

template <Activation K, class T>
struct ActivateBackward {
  const T *x, *d_out;
  T* d_x;

  template <int N>
  __device__ void at(int64_t i) const {
    float v[N], d[N];
    load<N>(x + i, v);
    load<N>(d_out + i, d);
#pragma unroll
    for (int k = 0; k < N; ++k) d[k] *= activate_derivative<K>(v[k]);
    store<N>(d_x + i, d);
  }
};

template <class T>
struct ScaleAdd {
  const T *residual, *branch, *gate;
  const float* scale;
  T* out;
  int64_t width;

  template <int N>
  __device__ void at(int64_t i) const {
    float h[N], v[N], s[N], g[N];
    load<N>(residual + i, h);
    load<N>(branch + i, v);
    load_or<N>(gate, i, 1.0f, g);
    load_or<N>(scale, scale ? place_of(i, width).column : 0, 1.0f, s);
#pragma unroll
    for (int k = 0; k < N; ++k) v[k] = h[k] + v[k] * s[k] * g[k];
    store<N>(out + i, v);
  }
};

/// The summands of the column sum d_scale: d_out * branch. The other gradients are written in the same pass.
template <class T>
struct ScaleAddBackward {
  const T *d_out, *branch, *gate;
  const float* scale;
  T *d_branch, *d_gate;
  int64_t width;

  template <int N>
  __device__ void at(int64_t row, int64_t column, float (&product)[N]) const {
    const int64_t i = row * width + column;
    float d[N], b[N], s[N], g[N];
    load<N>(d_out + i, d);
    load<N>(branch + i, b);
    load_or<N>(gate, i, 1.0f, g);
    load_or<N>(scale, column, 1.0f, s);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      product[k] = d[k] * b[k];
      d[k] = d[k] * s[k] * g[k];
    }
    store<N>(d_branch + i, d);
    if (d_gate) store<N>(d_gate + i, product);
  }
};

/// i indexes the elements of d_out [rows, n]; x and d_x are [rows, 2n].
template <class T>
struct SwigluBackward {
  const T *x, *d_out;
  T* d_x;
  int64_t n;

  template <int N>
  __device__ void at(int64_t i) const {
    const int64_t gate = i + place_of(i, n).row * n;  // in the row's first half
    float g[N], v[N], d[N];
    load<N>(x + gate, g);
    load<N>(x + gate + n, v);
    load<N>(d_out + i, d);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      v[k] *= d[k] * activate_derivative<Activation::Silu>(g[k]);
      d[k] *= activate<Activation::Silu>(g[k]);
    }
    store<N>(d_x + gate, v);
    store<N>(d_x + gate + n, d);
  }
};

template <class T>
struct Add {
  const T *a, *b;
  const float* factor;
  float scale;
  T* out;

  template <int N>
  __device__ void at(int64_t i) const {
    const float f = factor ? *factor * scale : scale;
    float x[N], y[N];
    load_or<N>(a, i, 0.0f, x);
    load<N>(b + i, y);
#pragma unroll
    for (int k = 0; k < N; ++k) x[k] += f * y[k];
    store<N>(out + i, x);
  }
};

template <class T>
struct Elements {
  const T* x;
  int64_t width;

  template <int N>
  __device__ void at(int64_t row, int64_t column, float (&values)[N]) const {
    load<N>(x + row * width + column, values);
  }
};

template <class T>
void activation_as(Activation kind, const void* x, void* out, int64_t n) {
  with_activation(kind, [&](auto k) { each<kVector<T>>(Activate<decltype(k)::value, T>{as<T>(x), as<T>(out)}, n, aligned({x, out})); });
}

template <class T>
void activation_backward_as(Activation kind, const void* x, const void* d_out, void* d_x, int64_t n) {
  with_activation(kind, [&](auto k) {
    each<kVector<T>>(ActivateBackward<decltype(k)::value, T>{as<T>(x), as<T>(d_out), as<T>(d_x)}, n, aligned({x, d_out, d_x}));
  });
}

template <class T>
void scale_add_as(const ScaleAddArgs& a) {
  const ScaleAdd<T> body{as<T>(a.residual), as<T>(a.branch), as<T>(a.gate), a.scale, as<T>(a.out), a.width};
  each<kVector<T>>(body, a.rows * a.width, aligned({a.residual, a.branch, a.gate, a.scale, a.out}) && a.width % kVector<T> == 0);
}

template <class T>
void scale_add_backward_as(const ScaleAddBackwardArgs& a) {
  const ScaleAddBackward<T> body{as<T>(a.d_out), as<T>(a.branch), as<T>(a.gate), a.scale, as<T>(a.d_branch), as<T>(a.d_gate), a.width};
  const bool vectors = aligned({a.d_out, a.branch, a.gate, a.scale, a.d_branch, a.d_gate}) && a.width % kVector<T> == 0;
  sum_columns<kVector<T>>(body, a.d_scale, a.rows, a.width, vectors);
}

template <class T>
void swiglu_backward_as(const void* x, const void* d_out, void* d_x, int64_t rows, int64_t n) {
  each<kVector<T>>(SwigluBackward<T>{as<T>(x), as<T>(d_out), as<T>(d_x), n}, rows * n, aligned({x, d_out, d_x}) && n % kVector<T> == 0);
}

template <class T>
void add_as(const void* a, const void* b, const float* factor, float scale, void* out, int64_t n) {
  each<kVector<T>>(Add<T>{as<T>(a), as<T>(b), factor, scale, as<T>(out)}, n, aligned({a, b, out}));
}

template <class T>
void column_sum_as(const void* x, float* out, int64_t rows, int64_t width) {
  sum_columns<kVector<T>>(Elements<T>{as<T>(x), width}, out, rows, width, aligned({x}) && width % kVector<T> == 0);
}

constexpr int kAddParts = 32;

/// Block: 32 columns; its warps share the groups, every 32nd to each.
__global__ void __launch_bounds__(kAddParts * kWarp) add_groups_kernel(const float* partial, int64_t groups, int64_t width, float* out) {
  __shared__ float parts[kAddParts * kWarp];
  const int64_t tile = int64_t{blockIdx.x} * kWarp, column = tile + threadIdx.x % kWarp;
  float total = 0;
  if (column < width) {
#pragma unroll 8
    for (int64_t g = threadIdx.x / kWarp; g < groups; g += kAddParts) total += partial[g * width + column];
  }
  parts[threadIdx.x] = total;
  write_sum_of_parts<kAddParts, kWarp>(parts, out + tile, width - tile < kWarp ? width - tile : kWarp);
}

}  // namespace

void add_groups(const float* partial, int64_t groups, int64_t width, float* out) {
  launch(add_groups_kernel, blocks_for(width, kWarp), kAddParts * kWarp, 0, partial, groups, width, out);
}

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
  dispatch_float(dtype, [&]<class T> { column_sum_as<T>(x, out, rows, width); });
}

}  // namespace uniflow::cuda
