/// LayerNorm and RMSNorm, with AdaLN modulation and the gated residual before it, and their backward pass.
///
/// A row belongs to a team of threads, from 8 lanes to a whole block depending on its width, and stays in their registers: it is read once,
/// its mean and then the variance of the differences are computed there, and it is written once. The vectors of a row are distributed
/// round-robin over the team, so neighbouring threads access neighbouring memory. In the backward pass, a block processes a group of rows
/// in sequence and keeps its columns' sums of d_weight and d_bias in registers until the end (column_sum.cuh).
/// Roofline bound: bytes of x (+ branch, gate, shift, scale) + out; backward x + d_out + d_x (+ scale, d_scale, d_shift).
#include <string>
#include <type_traits>

#include "native/cuda/column_sum.cuh"
#include "native/cuda/kernels.h"

namespace uniflow::cuda {
namespace {

/// A row in the registers of Team threads; each has Packs vectors of N columns.
template <int Team, int Packs, int N>
struct Layout {
  static constexpr int kTeam = Team, kN = N;
  static constexpr int kBlock = Team < 128 ? 128 : Team, kTeams = kBlock / Team;
  static constexpr int64_t kWidest = int64_t{Team} * Packs * N;

  using Row = float[Packs][N];

  /// Calls body(pack, column) for this thread's vectors inside the row.
  template <class Body>
  __device__ static void for_packs(int width, Body&& body) {
    const int first = static_cast<int>(threadIdx.x) % Team * N;
#pragma unroll
    for (int j = 0; j < Packs; ++j) {
      const int column = first + j * Team * N;
      if (column < width) body(j, column);
    }
  }
};

/// Adds each element of v over the threads of a team; all of them get the same sums.
template <int Team, int K>
__device__ void team_sum(float (&v)[K]) {
#pragma unroll
  for (int offset = (Team < kWarp ? Team : kWarp) / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int k = 0; k < K; ++k) v[k] += __shfl_xor_sync(kAllLanes, v[k], offset);
  }
  if constexpr (Team > kWarp) {
    __shared__ float partial[Team / kWarp][K];
    __syncthreads();  // all threads have read the sums of an earlier call
    if (threadIdx.x % kWarp == 0) {
#pragma unroll
      for (int k = 0; k < K; ++k) partial[threadIdx.x / kWarp][k] = v[k];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; ++k) {
      v[k] = 0;
#pragma unroll
      for (int warp = 0; warp < Team / kWarp; ++warp) v[k] += partial[warp][k];
    }
  }
}

/// x_hat = ((x - near) - rest) * inverse_std. A mean summed in float32 is off by some parts in 10^7, which matters if the mean is large
/// compared to the deviation. But x - near is nearly exact, and so is its own mean.
struct Moments {
  float near, rest, inverse_std;

  __device__ float normalise(float x) const { return ((x - near) - rest) * inverse_std; }
};

/// Moments of a row of `count` columns. width: the same, or 0 for a team that has no row and only takes part in the sums.
template <class L>
__device__ Moments moments(const typename L::Row& row, int width, float count, bool rms, float eps) {
  float total[1] = {};
  if (!rms) {
    L::for_packs(width, [&](int j, int) {
#pragma unroll
      for (int k = 0; k < L::kN; ++k) total[0] += row[j][k];
    });
    team_sum<L::kTeam>(total);
  }
  const float near = total[0] / count;
  float sums[2] = {};  // of the differences and of their squares
  L::for_packs(width, [&](int j, int) {
#pragma unroll
    for (int k = 0; k < L::kN; ++k) {
      const float d = row[j][k] - near;
      sums[0] += d;
      sums[1] += d * d;
    }
  });
  team_sum<L::kTeam>(sums);
  const float rest = rms ? 0.0f : sums[0] / count, variance = sums[1] / count - rest * rest;
  return {near, rest, 1.0f / sqrtf((variance > 0 ? variance : 0.0f) + eps)};
}

/// Row r of x; with the gated residual, x is the residual and receives the sum.
template <class L, class X, class Y>
__device__ void load_row(const NormArgs& a, int64_t r, int width, typename L::Row& row) {
  const X* x = static_cast<const X*>(a.x) + r * a.x_stride;
  L::for_packs(width, [&](int j, int column) { load_values<L::kN>(x + column, row[j]); });
  if constexpr (std::is_same_v<X, float>) {
    if (!a.branch) return;
    const Y *branch = static_cast<const Y*>(a.branch) + r * a.width, *gate = static_cast<const Y*>(a.gate) + r * a.gate_stride;
    L::for_packs(width, [&](int j, int column) {
      float b[L::kN], g[L::kN];
      load_values<L::kN>(branch + column, b);
      load_values<L::kN>(gate + column, g);
#pragma unroll
      for (int k = 0; k < L::kN; ++k) row[j][k] += g[k] * b[k];
    });
    L::for_packs(width, [&](int j, int column) { store<L::kN>(a.residual + r * a.width + column, row[j]); });
  }
}

template <class L, class Y>
__device__ void store_row(const NormArgs& a, int64_t r, int width, const typename L::Row& row, const Moments& m) {
  const Y* shift = static_cast<const Y*>(a.shift) + r * a.modulation_stride;
  const Y* scale = static_cast<const Y*>(a.scale) + r * a.modulation_stride;
  Y* out = static_cast<Y*>(a.out) + r * a.out_stride;
  L::for_packs(width, [&](int j, int column) {
    float v[L::kN], w[L::kN], b[L::kN];
    load_or<L::kN>(a.weight, column, 1.0f, w);
    load_or<L::kN>(a.bias, column, 0.0f, b);
#pragma unroll
    for (int k = 0; k < L::kN; ++k) v[k] = m.normalise(row[j][k]) * w[k] + b[k];
    if (a.scale) {
      load_values<L::kN>(scale + column, w);
      load_values<L::kN>(shift + column, b);
#pragma unroll
      for (int k = 0; k < L::kN; ++k) v[k] = v[k] * (1.0f + w[k]) + b[k];
    }
    store<L::kN>(out + column, v);
  });
}

template <class L, class X, class Y>
__global__ void __launch_bounds__(L::kBlock) norm_kernel(NormArgs a) {
  const int64_t r = int64_t{blockIdx.x} * L::kTeams + threadIdx.x / L::kTeam;
  const int width = r < a.rows ? static_cast<int>(a.width) : 0;
  typename L::Row row;
  load_row<L, X, Y>(a, r, width, row);
  const Moments m = moments<L>(row, width, static_cast<float>(a.width), a.rms, a.eps);
  store_row<L, Y>(a, r, width, row, m);
}

/// Backward pass of one row. With y = x_hat * weight + bias and out = y * (1 + scale) + shift: d_x = (d_x_hat - mean(d_x_hat) - x_hat *
/// mean(d_x_hat * x_hat)) / std, without the first mean for RMSNorm.
template <class L, class T>
__device__ void norm_row_backward(const NormBackwardArgs& a, int64_t r, int width, typename L::Row& d_weight, typename L::Row& d_bias) {
  constexpr int N = L::kN;
  const float count = static_cast<float>(a.width);
  typename L::Row x, d;  // x, then x_hat; d_out, then d_x_hat
  L::for_packs(width, [&](int j, int column) { load_values<N>(static_cast<const T*>(a.x) + r * a.x_stride + column, x[j]); });
  L::for_packs(width, [&](int j, int column) { load_values<N>(static_cast<const T*>(a.d_out) + r * a.d_stride + column, d[j]); });
  const Moments m = moments<L>(x, width, count, a.rms, a.eps);
  float sums[2] = {};  // of d_x_hat and of d_x_hat * x_hat
  L::for_packs(width, [&](int j, int column) {
    float w[N];
    load_or<N>(a.weight, column, 1.0f, w);
#pragma unroll
    for (int k = 0; k < N; ++k) x[j][k] = m.normalise(x[j][k]);
    if (a.scale) {
      const int64_t at = r * a.width + column;
      float s[N], b[N];
      load_values<N>(static_cast<const T*>(a.scale) + at, s);
      load_or<N>(a.bias, column, 0.0f, b);
      if (a.d_shift) store<N>(static_cast<T*>(a.d_shift) + at, d[j]);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        b[k] = d[j][k] * (x[j][k] * w[k] + b[k]);
        d[j][k] *= 1.0f + s[k];
      }
      if (a.d_scale) store<N>(static_cast<T*>(a.d_scale) + at, b);
    }
#pragma unroll
    for (int k = 0; k < N; ++k) {
      d_weight[j][k] += d[j][k] * x[j][k];
      d_bias[j][k] += d[j][k];
      d[j][k] *= w[k];
      sums[0] += d[j][k];
      sums[1] += d[j][k] * x[j][k];
    }
  });
  team_sum<L::kTeam>(sums);
  const float mean = a.rms ? 0.0f : sums[0] / count, along = sums[1] / count;
  L::for_packs(width, [&](int j, int column) {
#pragma unroll
    for (int k = 0; k < N; ++k) d[j][k] = (d[j][k] - mean - x[j][k] * along) * m.inverse_std;
    store<N>(static_cast<T*>(a.d_x) + r * a.d_stride + column, d[j]);
  });
}

/// to [width] = the sum over the teams.
template <class L>
__device__ void store_sum(const typename L::Row& sum, int width, float* to) {
  if (!to) return;
  if constexpr (L::kTeams == 1) {
    L::for_packs(width, [&](int j, int column) {
#pragma unroll
      for (int k = 0; k < L::kN; ++k) to[column + k] = sum[j][k];
    });
  } else {
    __shared__ float parts[L::kTeams * L::kWidest];
    __syncthreads();  // all threads have read the parts of an earlier call
    float* part = parts + threadIdx.x / L::kTeam * L::kWidest;
    L::for_packs(width, [&](int j, int column) {
#pragma unroll
      for (int k = 0; k < L::kN; ++k) part[column + k] = sum[j][k];
    });
    write_sum_of_parts<L::kTeams, L::kWidest>(parts, to, width);
  }
}

/// Block: rows_each rows, processed as many at a time as it has teams. d_weight, d_bias: [blocks, width] or null.
template <class L, class T>
__global__ void __launch_bounds__(L::kBlock) norm_backward_kernel(NormBackwardArgs a, int64_t rows_each, float* d_weight, float* d_bias) {
  const int64_t begin = int64_t{blockIdx.x} * rows_each, end = begin + rows_each < a.rows ? begin + rows_each : a.rows;
  const int width = static_cast<int>(a.width);
  typename L::Row weight_sum = {}, bias_sum = {};
  for (int64_t first = begin; first < end; first += L::kTeams) {
    const int64_t r = first + threadIdx.x / L::kTeam;
    norm_row_backward<L, T>(a, r, r < end ? width : 0, weight_sum, bias_sum);
  }
  store_sum<L>(weight_sum, width, d_weight ? d_weight + blockIdx.x * a.width : nullptr);
  store_sum<L>(bias_sum, width, d_bias ? d_bias + blockIdx.x * a.width : nullptr);
}

// --- host side -------------------------------------------------------------------------------------------------------

/// Calls body(L{}) with the narrowest layout that fits a row of `width` columns.
template <class L, class... Wider, class Body>
void with_layout(int64_t width, Body&& body) {
  if (width <= L::kWidest) return body(L{});
  if constexpr (sizeof...(Wider) > 0) with_layout<Wider...>(width, body);
  else throw Error(ErrorCode::Unsupported, "norm", "at most " + std::to_string(L::kWidest) + " columns on a GPU", std::to_string(width));
}

template <int N, class X, class Y>
void norm_by(const NormArgs& a) {
  with_layout<Layout<8, 8 / N, N>, Layout<32, 8 / N, N>, Layout<32, 32 / N, N>, Layout<128, 16 / N, N>, Layout<256, 32 / N, N>>(a.width, [&](auto layout) {
    using L = decltype(layout);
    launch(norm_kernel<L, X, Y>, blocks_for(a.rows, L::kTeams), L::kBlock, 0, a);
  });
}

template <class X, class Y>
void norm_as(const NormArgs& a) {
  constexpr int N = kVectorOf<X, Y>;
  const bool strides = (a.width | a.x_stride | a.out_stride | a.modulation_stride | a.gate_stride) % N == 0;
  if (strides && aligned({a.x, a.out, a.weight, a.bias, a.shift, a.scale, a.branch, a.gate})) norm_by<N, X, Y>(a);
  else norm_by<1, X, Y>(a);
}

/// 8 columns per thread, 16 in the widest rows: the row, its gradient and two sums take four registers per column. Single columns also take
/// addresses of their own, so rows that are read one by one get more threads; above 4096 columns some registers still spill.
template <int N, class T>
void norm_backward_by(const NormBackwardArgs& a) {
  const auto run = [&](auto layout) {
    using L = decltype(layout);
    // As many blocks as the registers allow at a time on 132 multiprocessors, which avoids a second, nearly empty wave.
    constexpr int64_t kBlocks = L::kTeam >= 512 ? 1024 : L::kTeam == 256 ? 384 : 768, kFewestRows = 4;
    const RowGroups groups = row_groups(a.rows, kBlocks, std::max<int64_t>(L::kTeams, kFewestRows));
    const ColumnSum weight(a.d_weight, groups.count, a.width), bias(a.d_bias, groups.count, a.width);
    launch(norm_backward_kernel<L, T>, blocks_for(groups.count, 1), L::kBlock, 0, a, groups.rows, weight.partial(), bias.partial());
    weight.finish();
    bias.finish();
  };
  using Widest = std::conditional_t<N == 1, Layout<1024, 8, 1>, Layout<512, 16 / N, N>>;
  with_layout<Layout<8, 8 / N, N>, Layout<32, 8 / N, N>, Layout<128, 8 / N, N>, Layout<256, 8 / N, N>, Layout<512, 8 / N, N>, Widest>(a.width, run);
}

template <class T>
void norm_backward_as(const NormBackwardArgs& a) {
  constexpr int N = kVector<T>;
  const bool strides = (a.width | a.x_stride | a.d_stride) % N == 0;
  if (strides && aligned({a.x, a.d_out, a.d_x, a.weight, a.bias, a.scale, a.d_scale, a.d_shift})) norm_backward_by<N, T>(a);
  else norm_backward_by<1, T>(a);
}

}  // namespace

void norm(const NormArgs& args) {
  NormArgs a = args;
  if (a.residual) a.x = a.residual, a.x_stride = a.width, a.x_dtype = DType::Float32;
  const bool x16 = a.x_dtype == DType::BFloat16, y16 = a.out_dtype == DType::BFloat16;
  if (x16 && y16) norm_as<bf16, bf16>(a);
  else if (x16) norm_as<bf16, float>(a);
  else if (y16) norm_as<float, bf16>(a);
  else norm_as<float, float>(a);
}

void norm_backward(const NormBackwardArgs& a) {
  dispatch_float(a.dtype, [&]<class T> { norm_backward_as<T>(a); });
}

}  // namespace uniflow::cuda
