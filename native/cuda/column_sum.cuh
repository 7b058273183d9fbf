/// Sums over rows, identical in every run. Rows are summed in groups, each by one block; then the groups are summed in a fixed order. The
/// groups depend only on the sizes (and on whether rows are 16-byte aligned). Summing the groups takes a few percent of the time for the
/// rows.
#pragma once

#include "native/cuda/vectors.cuh"

namespace uniflow::cuda {

/// `count` groups of `rows` rows (the last may have fewer); always at least one.
struct RowGroups {
  int64_t rows, count;
};

/// At most `most` groups, whose size is a multiple of `multiple` rows.
inline RowGroups row_groups(int64_t rows, int64_t most, int64_t multiple) {
  const int64_t each = (rows + most - 1) / most, rounded = std::max<int64_t>((each + multiple - 1) / multiple, 1) * multiple;
  return {rounded, std::max<int64_t>((rows + rounded - 1) / rounded, 1)};
}

/// out [width] = sum over the groups of partial [groups, width].
void add_groups(const float* partial, int64_t groups, int64_t width, float* out);  // residual.cu

/// Group sums of one result [width]; if out is null, nothing is summed.
class ColumnSum {
 public:
  ColumnSum(float* out, int64_t groups, int64_t width) : out_(out), groups_(groups), width_(width) {
    if (out && groups > 1) partial_ = scratch(DType::Float32, {groups, width});
  }

  /// Group sums [groups, width], written by the groups; or null.
  float* partial() const { return partial_ ? partial_.data<float>() : out_; }

  /// Queues the sum over the groups.
  void finish() const {
    if (partial_) add_groups(partial_.data<float>(), groups_, width_, out_);
  }

 private:
  float* out_;
  int64_t groups_, width_;
  Tensor partial_;
};

/// to [n] = the sum over k of parts[k * kStride + i], in order; parts are in shared memory, written by all threads before this.
template <int kParts, int kStride>
__device__ inline void write_sum_of_parts(const float* parts, float* to, int64_t n) {
  __syncthreads();
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    float total = 0;
#pragma unroll
    for (int k = 0; k < kParts; ++k) total += parts[k * kStride + i];
    to[i] = total;
  }
}

constexpr int kSumWarps = 8;

/// Block (tile, group): each lane has N columns of the tile, each warp every kSumWarps-th row of the group.
template <int N, class Body>
__global__ void __launch_bounds__(kSumWarps * kWarp)
    sum_columns_kernel(Body body, int64_t rows, int64_t width, int64_t rows_each, float* partial) {
  constexpr int kTile = kWarp * N;
  __shared__ float parts[kSumWarps * kTile];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t tile = int64_t{blockIdx.x} * kTile, column = tile + lane * N;
  const int64_t begin = int64_t{blockIdx.y} * rows_each, end = begin + rows_each < rows ? begin + rows_each : rows;
  float total[N] = {};
  if (column < width) {
#pragma unroll 4
    for (int64_t r = begin + warp; r < end; r += kSumWarps) {
      float values[N];
      body.template at<N>(r, column, values);
#pragma unroll
      for (int k = 0; k < N; ++k) total[k] += values[k];
    }
  }
  if (!partial) return;
#pragma unroll
  for (int k = 0; k < N; ++k) parts[warp * kTile + lane * N + k] = total[k];
  const int64_t there = width - tile < kTile ? width - tile : kTile;
  write_sum_of_parts<kSumWarps, kTile>(parts, partial + int64_t{blockIdx.y} * width + tile, there);
}

template <int N, class Body>
void sum_columns_by(const Body& body, float* out, int64_t rows, int64_t width) {
  constexpr int64_t kBlocks = 2048, kFewestRows = 2 * kSumWarps;
  const int64_t tiles = blocks_for(width, kWarp * N);
  const RowGroups groups = row_groups(rows, std::max<int64_t>(kBlocks / tiles, 1), kFewestRows);
  const ColumnSum sum(out, groups.count, width);
  launch(sum_columns_kernel<N, Body>, dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(groups.count)), kSumWarps * kWarp, 0, body,
         rows, width, groups.rows, sum.partial());
  sum.finish();
}

/// out [width] = the sum over the rows of the values that body.at<N>(row, column, values) returns for columns [column, column + N). The
/// body is called once for each of them, even if out is null. It handles N at a time if `vectors` says that N divides a row and everything
/// is aligned.
template <int N, class Body>
void sum_columns(const Body& body, float* out, int64_t rows, int64_t width, bool vectors) {
  if (vectors) sum_columns_by<N>(body, out, rows, width);
  else sum_columns_by<1>(body, out, rows, width);
}

}  // namespace uniflow::cuda
