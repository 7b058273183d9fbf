/// The backward pass of multi-head self-attention, without an S x S matrix in memory. Any S >= 1, 1 <= E <= 512, scale > 0.
///
/// p = exp(scale * q k^T - log_sum_exp) is recomputed; delta = sum(d_out * out) per query. Then
///   d_v = p^T d_out;  d_s = p * (d_out v^T - delta);  d_q = scale * d_s k;  d_k = scale * d_s^T q.
/// Three kernels compute: delta; then d_k and d_v, where a block owns keys of one head and iterates over its queries, with scores
/// transposed, keys x queries; then d_q, where a block owns queries and iterates over the keys. Every sum is computed by one thread in one
/// order, so the result does not change between runs or with the batch. Both of the latter compute p and d_s, which makes 7 products
/// instead of the 5 counted in 10*B*H*S*S*E FLOPs. In a single kernel, blocks would either add to d_q in arbitrary order or wait for each
/// other.
///
/// bfloat16, E a multiple of 8 up to 128: tensor cores (attention_tile.cuh). Scores of 16 or 32 rows per warp by 32 columns become the left
/// sides p and d_s without leaving their registers. Everything else: float32 multiply-adds in tiles of 64 x 64.
#include "native/cuda/attention_tile.cuh"
#include "native/cuda/kernels.h"

namespace uniflow::cuda {
namespace {

/// Per-query values known before the scores. A missing query has weights of 2^-infinity.
struct alignas(8) Query {
  float log_sum = kInfinity, delta = 0;  // log_sum_exp to base 2
};

// --- delta ------------------------------------------------------------------------------------------------------------------

constexpr int kDeltaLanes = 8, kDeltaThreads = 256, kDeltaRows = kDeltaThreads / kDeltaLanes;

/// Computes queries [heads of the batch, padded] with eight lanes per query, kN elements of out and d_out at a time.
template <class T, int kN>
__global__ void __launch_bounds__(kDeltaThreads) query_deltas(const T* out, const T* d_out, const float* log_sum_exp, Query* queries,
                                                              int padded, HeadSizes sizes) {
  const int64_t i = int64_t{blockIdx.x} * kDeltaRows + threadIdx.x / kDeltaLanes;
  const int lane = static_cast<int>(threadIdx.x) % kDeltaLanes, head = static_cast<int>(i / padded), token = static_cast<int>(i % padded);
  const bool valid = token < sizes.seq;
  float delta = 0;
  const int64_t at = sizes.in_out(head, token);
  for (int e = lane * kN; valid && e < sizes.head_dim; e += kDeltaLanes * kN) {
    float a[kN], b[kN];
    load<kN>(out + at + e, a);
    load<kN>(d_out + at + e, b);
#pragma unroll
    for (int j = 0; j < kN; ++j) delta += a[j] * b[j];
  }
#pragma unroll
  for (int offset = kDeltaLanes / 2; offset > 0; offset /= 2) delta += __shfl_xor_sync(kAllLanes, delta, offset);
  if (lane != 0) return;
  Query query;
  if (valid) query = {log_sum_exp[int64_t{head} * sizes.seq + token] * kLog2E, delta};
  queries[i] = query;
}

// --- tensor cores -----------------------------------------------------------------------------------------------------------

constexpr int kColumns = 32;  // of the scores: rows of the tiles in the loop

/// Fragments of 16 rows per warp, limited by the registers for their gradients.
template <int kWidth>
constexpr int kKeyTiles = kWidth <= 64 ? 2 : 1;
template <int kWidth>
constexpr int kQueryTiles = kWidth <= 96 ? 2 : 1;
/// Whether registers remain for the rows of q and of d_out themselves.
template <int kWidth>
constexpr bool kKeepQ = kWidth <= 64 || kQueryTiles<kWidth> == 1;
template <int kWidth>
constexpr bool kKeepDOut = kQueryTiles<kWidth> == 1;

/// Shared memory in bytes: two matrices of owned rows, two stages of two tiles, and two stages of queries.
template <int kWidth>
constexpr size_t kSharedBytes(int tiles) {
  return static_cast<size_t>((2 * tensor::kWarps * tiles * 16 + 4 * kColumns) * kWidth) * sizeof(bf16) + 2 * kColumns * sizeof(Query);
}

/// Processes kColumns queries: d_k += d_s^T q, d_v += p^T d_out.
template <int kWidth, int kTiles = kKeyTiles<kWidth>>
__device__ inline void add_to_keys(const tensor::Left<kTiles, kWidth, false>& k, const tensor::Left<kTiles, kWidth, false>& v,
                                   const bf16* q, const bf16* d_out, const Query* queries, float scale,
                                   float (&d_k)[kTiles][kWidth / 8][4], float (&d_v)[kTiles][kWidth / 8][4]) {
  float weight[kTiles][kColumns / 8][4] = {}, d_score[kTiles][kColumns / 8][4] = {};
  tensor::multiply_rows<kTiles, kWidth, kColumns>(weight, k, q);
  tensor::multiply_rows<kTiles, kWidth, kColumns>(d_score, v, d_out);
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
    const Pack<Query, 2> two = *reinterpret_cast<const Pack<Query, 2>*>(queries + n * 8 + tensor::lane() % 4 * 2);
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Query& query = two.v[i % 2];
        weight[m][n][i] = exp2_approx(fmaf(weight[m][n][i], scale, -query.log_sum));
        d_score[m][n][i] = weight[m][n][i] * (d_score[m][n][i] - query.delta);
      }
  }
  tensor::multiply_columns<kTiles, kWidth, kColumns>(d_v, tensor::Weights<kTiles, kColumns>(weight), d_out);
  tensor::multiply_columns<kTiles, kWidth, kColumns>(d_k, tensor::Weights<kTiles, kColumns>(d_score), q);
}

template <int kWidth>
__global__ void __launch_bounds__(tensor::kThreads, 2) key_gradients_tensor(const bf16* qkv, const bf16* d_out, const Query* queries,
                                                                            int padded, bf16* d_qkv, HeadSizes sizes) {
  constexpr int kTiles = kKeyTiles<kWidth>, kWarpRows = kTiles * 16, kRows = tensor::kWarps * kWarpRows;
  constexpr int kTileElements = kColumns * kWidth;
  bf16 *const keys = dynamic_shared<bf16>(), *const values = keys + kRows * kWidth, *const stages = values + kRows * kWidth;
  Query* const query_stages = reinterpret_cast<Query*>(stages + 4 * kTileElements);
  const HeadBlock block(sizes, kRows);
  const int first = block.first + static_cast<int>(tensor::warp()) * kWarpRows;  // of this warp
  const unsigned mine = tensor::warp() * kWarpRows * kWidth;
  const int stride = sizes.qkv_stride;
  const bf16 *query_rows = qkv + sizes.in_qkv(block.head, 0, 0), *d_out_rows = d_out + sizes.in_out(block.head, 0);
  queries += int64_t{block.head} * padded + threadIdx.x * 2;
  const auto load = [&](int tile, bf16* stage) {  // called for the tiles in order
    const int rows = sizes.seq - tile * kColumns;
    tensor::load_tile<kWidth, kColumns>(stage, query_rows, stride, rows, sizes.head_dim);
    tensor::load_tile<kWidth, kColumns>(stage + kTileElements, d_out_rows, sizes.out_stride, rows, sizes.head_dim);
    if (threadIdx.x < kColumns / 2) cp_async_16(query_stages + tile % 2 * kColumns + threadIdx.x * 2, queries);
    query_rows += kColumns * stride;
    d_out_rows += kColumns * sizes.out_stride;
    queries += kColumns;
  };
  const bf16* const from = qkv + sizes.in_qkv(block.head, block.first, 1);
  tensor::load_tile<kWidth, kRows>(keys, from, stride, sizes.seq - block.first, sizes.head_dim);
  tensor::load_tile<kWidth, kRows>(values, from + sizes.out_stride, stride, sizes.seq - block.first, sizes.head_dim);

  tensor::Left<kTiles, kWidth, false> k, v;
  k.start(keys + mine);
  v.start(values + mine);
  float d_k[kTiles][kWidth / 8][4] = {}, d_v[kTiles][kWidth / 8][4] = {};
  tensor::for_tiles((sizes.seq + kColumns - 1) / kColumns, stages, 2 * kTileElements, load, [&](int tile, const bf16* q) {
    if (first >= sizes.seq) return;
    add_to_keys<kWidth>(k, v, q, q + kTileElements, query_stages + tile % 2 * kColumns, sizes.exponent_scale, d_k, d_v);
  });
  if (first >= sizes.seq) return;
  bf16* const to = d_qkv + sizes.in_qkv(block.head, first, 1);
  const int at = (first - block.first) * kWidth, rows = sizes.seq - first;
  tensor::store_rows<kTiles, kWidth>(d_k, sizes.scale, keys + at, to, stride, rows, sizes.head_dim);
  tensor::store_rows<kTiles, kWidth>(d_v, 1, values + at, to + sizes.out_stride, stride, rows, sizes.head_dim);
}

/// Processes kColumns keys, of which `keys` exist: d_q += d_s k. own: this lane's query rows.
template <int kWidth, int kTiles = kQueryTiles<kWidth>>
__device__ inline void add_to_queries(const tensor::Left<kTiles, kWidth, kKeepQ<kWidth>>& q,
                                      const tensor::Left<kTiles, kWidth, kKeepDOut<kWidth>>& d_out, const bf16* k, const bf16* v, int keys,
                                      float scale, const Query (&own)[kTiles][2], float (&d_q)[kTiles][kWidth / 8][4]) {
  float weight[kTiles][kColumns / 8][4] = {}, d_score[kTiles][kColumns / 8][4] = {};
  tensor::multiply_rows<kTiles, kWidth, kColumns>(weight, q, k);
  tensor::multiply_rows<kTiles, kWidth, kColumns>(d_score, d_out, v);
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Query& query = own[m][i / 2];
        d_score[m][n][i] = exp2_approx(fmaf(weight[m][n][i], scale, -query.log_sum)) * (d_score[m][n][i] - query.delta);
        // the factors of the zero rows of missing keys must be finite
        if (keys < kColumns && static_cast<int>(n * 8 + tensor::lane() % 4 * 2 + i % 2) >= keys) d_score[m][n][i] = 0;
      }
  tensor::multiply_columns<kTiles, kWidth, kColumns>(d_q, tensor::Weights<kTiles, kColumns>(d_score), k);
}

template <int kWidth>
__global__ void __launch_bounds__(tensor::kThreads, 2) query_gradients_tensor(const bf16* qkv, const bf16* d_out, const Query* queries,
                                                                              int padded, bf16* d_qkv, HeadSizes sizes) {
  constexpr int kTiles = kQueryTiles<kWidth>, kWarpRows = kTiles * 16, kRows = tensor::kWarps * kWarpRows;
  constexpr int kTileElements = kColumns * kWidth;
  bf16 *const own_q = dynamic_shared<bf16>(), *const own_d_out = own_q + kRows * kWidth, *const stages = own_d_out + kRows * kWidth;
  const HeadBlock block(sizes, kRows);
  const int first = block.first + static_cast<int>(tensor::warp()) * kWarpRows;  // of this warp
  const unsigned mine = tensor::warp() * kWarpRows * kWidth;
  const int stride = sizes.qkv_stride, rows = sizes.seq - block.first;
  const bf16* const key_rows = qkv + sizes.in_qkv(block.head, 0, 1);
  const auto load = [&](int tile, bf16* stage) {
    const bf16* const from = key_rows + int64_t{tile} * kColumns * stride;
    const int there = sizes.seq - tile * kColumns;
    tensor::load_tile<kWidth, kColumns>(stage, from, stride, there, sizes.head_dim);
    tensor::load_tile<kWidth, kColumns>(stage + kTileElements, from + sizes.out_stride, stride, there, sizes.head_dim);
  };
  tensor::load_tile<kWidth, kRows>(own_q, qkv + sizes.in_qkv(block.head, block.first, 0), stride, rows, sizes.head_dim);
  tensor::load_tile<kWidth, kRows>(own_d_out, d_out + sizes.in_out(block.head, block.first), sizes.out_stride, rows, sizes.head_dim);

  Query own[kTiles][2];
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = first + m * 16 + half * 8 + static_cast<int>(tensor::lane() / 4);
      if (token < sizes.seq) own[m][half] = queries[int64_t{block.head} * padded + token];
    }
  tensor::Left<kTiles, kWidth, kKeepQ<kWidth>> q;
  tensor::Left<kTiles, kWidth, kKeepDOut<kWidth>> gradient;
  float d_q[kTiles][kWidth / 8][4] = {};
  tensor::for_tiles((sizes.seq + kColumns - 1) / kColumns, stages, 2 * kTileElements, load, [&](int tile, const bf16* k) {
    if (first >= sizes.seq) return;
    if (tile == 0) {
      q.start(own_q + mine);
      gradient.start(own_d_out + mine);
    }
    add_to_queries<kWidth>(q, gradient, k, k + kTileElements, sizes.seq - tile * kColumns, sizes.exponent_scale, own, d_q);
  });
  if (first >= sizes.seq) return;
  tensor::store_rows<kTiles, kWidth>(d_q, sizes.scale, own_q + mine, d_qkv + sizes.in_qkv(block.head, first, 0), stride, sizes.seq - first,
                                     sizes.head_dim);
}

template <int kWidth>
void run_tensor(const AttentionBackwardArgs& a, const Query* queries, int64_t padded) {
  const auto launch_one = [&](auto* kernel, int tiles) {
    launch_with_shared(kernel, head_blocks(a, tensor::kWarps * tiles * 16), tensor::kThreads, kSharedBytes<kWidth>(tiles),
                       static_cast<const bf16*>(a.qkv), static_cast<const bf16*>(a.d_out), queries, padded, static_cast<bf16*>(a.d_qkv),
                       HeadSizes(a));
  };
  launch_one(key_gradients_tensor<kWidth>, kKeyTiles<kWidth>);
  launch_one(query_gradients_tensor<kWidth>, kQueryTiles<kWidth>);
}

// --- plain ------------------------------------------------------------------------------------------------------------------

using plain::kSide;
using plain::Square;

/// sum = a b^T over all columns of two heads' rows; `left` and `right` are tiles in shared memory.
template <class T>
__device__ inline void product(Square& sum, const T* a, int a_stride, int a_rows, const T* b, int b_stride, int b_rows, int head_dim,
                               float* left, float* right) {
  for (int e = 0; e < head_dim; e += kSide) {
    __syncthreads();  // all threads have finished with the tiles
    plain::load_tile(left, a + e, a_stride, a_rows, head_dim - e);
    plain::load_tile(right, b + e, b_stride, b_rows, head_dim - e);
    __syncthreads();
    plain::multiply_rows(sum, left, right, min(kSide, head_dim - e));
  }
}

/// sum += weights * rows, for the head's columns that start at `rows`.
template <class T>
__device__ inline void add_product(Square& sum, const Square& weights, const T* rows, int stride, int count, int columns, float* left,
                                   float* right) {
  __syncthreads();
  plain::store_tile(left, weights);
  plain::load_tile(right, rows, stride, count, columns);
  __syncthreads();
  plain::multiply_columns(sum, left, right, min(kSide, count));
}

template <class T>
__global__ void __launch_bounds__(plain::kThreads, 2) key_gradients_plain(const T* qkv, const T* d_out, const Query* queries, int padded,
                                                                          T* d_qkv, HeadSizes sizes) {
  float *const left = dynamic_shared<float>(), *const right = left + plain::kTileFloats;
  const HeadBlock block(sizes, kSide);
  const int head_dim = sizes.head_dim, stride = sizes.qkv_stride, keys = sizes.seq - block.first;
  const int column = static_cast<int>(blockIdx.y) * kSide;  // first column of this block
  const T* const k = qkv + sizes.in_qkv(block.head, block.first, 1);
  Square d_k = {}, d_v = {};
  for (int token = 0; token < sizes.seq; token += kSide) {
    const T *const q = qkv + sizes.in_qkv(block.head, token, 0), *const d = d_out + sizes.in_out(block.head, token);
    const int count = sizes.seq - token;
    Square weight = {}, d_score = {};
    product(weight, k, stride, keys, q, stride, count, head_dim, left, right);
    product(d_score, k + sizes.out_stride, stride, keys, d, sizes.out_stride, count, head_dim, left, right);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const Query query = queries[int64_t{block.head} * padded + token + plain::x() + 16 * j];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weight[i][j] = exp2f(fmaf(weight[i][j], sizes.exponent_scale, -query.log_sum));
        d_score[i][j] = weight[i][j] * (d_score[i][j] - query.delta);
      }
    }
    add_product(d_v, weight, d + column, sizes.out_stride, count, head_dim - column, left, right);
    add_product(d_k, d_score, q + column, stride, count, head_dim - column, left, right);
  }
  T* const to = d_qkv + sizes.in_qkv(block.head, block.first, 1) + column;
  plain::store_rows(d_k, sizes.scale, to, stride, keys, head_dim - column);
  plain::store_rows(d_v, 1, to + sizes.out_stride, stride, keys, head_dim - column);
}

template <class T>
__global__ void __launch_bounds__(plain::kThreads, 2) query_gradients_plain(const T* qkv, const T* d_out, const Query* queries, int padded,
                                                                            T* d_qkv, HeadSizes sizes) {
  float *const left = dynamic_shared<float>(), *const right = left + plain::kTileFloats;
  const HeadBlock block(sizes, kSide);
  const int head_dim = sizes.head_dim, stride = sizes.qkv_stride, rows = sizes.seq - block.first;
  const int column = static_cast<int>(blockIdx.y) * kSide;
  const T* const q = qkv + sizes.in_qkv(block.head, block.first, 0);
  const T* const d = d_out + sizes.in_out(block.head, block.first);
  Query own[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) own[i] = queries[int64_t{block.head} * padded + block.first + 4 * plain::y() + i];
  Square d_q = {};
  for (int token = 0; token < sizes.seq; token += kSide) {
    const T* const k = qkv + sizes.in_qkv(block.head, token, 1);
    const int keys = sizes.seq - token;
    Square weight = {}, d_score = {};
    product(weight, q, stride, rows, k, stride, keys, head_dim, left, right);
    product(d_score, d, sizes.out_stride, rows, k + sizes.out_stride, stride, keys, head_dim, left, right);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float p = exp2f(fmaf(weight[i][j], sizes.exponent_scale, -own[i].log_sum));
        d_score[i][j] = plain::x() + 16 * j < keys ? p * (d_score[i][j] - own[i].delta) : 0.0f;
      }
    add_product(d_q, d_score, k + column, stride, keys, head_dim - column, left, right);
  }
  plain::store_rows(d_q, sizes.scale, d_qkv + sizes.in_qkv(block.head, block.first, 0) + column, stride, rows, head_dim - column);
}

template <class T>
void run_plain(const AttentionBackwardArgs& a, const Query* queries, int64_t padded) {
  const dim3 grid(head_blocks(a, kSide), blocks_for(a.head_dim, kSide));
  for (auto* kernel : {key_gradients_plain<T>, query_gradients_plain<T>})
    launch_with_shared(kernel, grid, plain::kThreads, 2 * plain::kTileFloats * sizeof(float), static_cast<const T*>(a.qkv),
                       static_cast<const T*>(a.d_out), queries, padded, static_cast<T*>(a.d_qkv), HeadSizes(a));
}

constexpr int kCenterColumns = 32, kCenterRows = 8;

/// Adding one vector to all keys of a head shifts each row of scores and changes no probability, so the gradients of the keys sum to zero.
/// Rounding leaves a remainder of 1e-7 of them. Adam's steps do not shrink with the gradient, so it would turn the remainder into a drift
/// of the key bias. This removes the remainder, as far as float32 can resolve it. A block has kCenterColumns columns of a head and
/// processes kCenterRows tokens at a time.
__global__ void __launch_bounds__(kCenterColumns* kCenterRows) center_keys(float* d_qkv, HeadSizes sizes) {
  __shared__ float sums[kCenterRows][kCenterColumns];
  const int x = static_cast<int>(threadIdx.x), y = static_cast<int>(threadIdx.y), stride = sizes.qkv_stride;
  const int column = static_cast<int>(blockIdx.y) * kCenterColumns + x;
  const bool valid = column < sizes.head_dim;
  float* const keys = d_qkv + sizes.in_qkv(static_cast<int>(blockIdx.x), 0, 1) + column;
  float sum = 0;
  for (int token = y; valid && token < sizes.seq; token += kCenterRows) sum += keys[int64_t{token} * stride];
  sums[y][x] = sum;
  __syncthreads();
  float total = 0;
  for (int row = 0; row < kCenterRows; ++row) total += sums[row][x];
  const float mean = total / static_cast<float>(sizes.seq);
  for (int token = y; valid && token < sizes.seq; token += kCenterRows) keys[int64_t{token} * stride] -= mean;
}

template <class T, int kN>
void run_deltas(const AttentionBackwardArgs& a, Query* queries, int64_t padded) {
  launch(query_deltas<T, kN>, blocks_for(a.batch * a.heads * padded, kDeltaRows), kDeltaThreads, 0, static_cast<const T*>(a.out),
         static_cast<const T*>(a.d_out), a.log_sum_exp, queries, padded, HeadSizes(a));
}

}  // namespace

void attention_backward(const AttentionBackwardArgs& a) {
  static_assert(kSide % kColumns == 0);
  const int64_t padded = round_up(a.seq, kSide);  // whole tiles on either path
  const Tensor scratched = scratch(DType::Float32, {a.batch * a.heads, padded, 2});
  auto* const queries = scratched.data<Query>();
  if (a.dtype == DType::Float32) {
    run_deltas<float, 1>(a, queries, padded);
    run_plain<float>(a, queries, padded);
    const dim3 grid(static_cast<unsigned>(a.batch * a.heads), blocks_for(a.head_dim, kCenterColumns));
    launch(center_keys, grid, dim3(kCenterColumns, kCenterRows), 0, static_cast<float*>(a.d_qkv), HeadSizes(a));
  } else if (tensor::takes(a, {a.qkv, a.out, a.d_out, a.d_qkv})) {
    run_deltas<bf16, kVector<bf16>>(a, queries, padded);
    tensor::with_width(a.head_dim, [&]<int kWidth>() { run_tensor<kWidth>(a, queries, padded); });
  } else {
    run_deltas<bf16, 1>(a, queries, padded);
    run_plain<bf16>(a, queries, padded);
  }
}

}  // namespace uniflow::cuda
