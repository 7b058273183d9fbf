/// Multi-head self-attention, softmax(q k^T * scale) v, with an online softmax: no S x S matrix in memory. Any S >= 1,
/// 1 <= E <= 512, scale > 0. FLOPs 4*B*H*S*S*E; bytes: q, k, v read and out written once, 4*B*S*H*E elements.
///
/// A block owns some query rows of one head and iterates over the head's keys, 64 or 32 at a time:
///   scores = q k^T; weights = 2^(scores * scale * log2 e - running maximum); sum += weights;
///   out = out * 2^(old maximum - new maximum) + weights v; and at the end out / sum.
/// The result of a row depends only on S and E, not on the batch or the block.
///
/// bfloat16, E a multiple of 8 up to 128: tensor cores by mma.sync. Each of four warps has 32 query rows, with scores, weights and out in
/// registers from the first product to the last. Keys and values are loaded by cp.async; the next tile is loaded while the current one is
/// processed. A partial last tile is processed 16 keys at a time and warps without rows do nothing, so a class token that makes 1025 tokens
/// of 1024 costs little. mma.sync exists on every GPU since sm_80. wgmma (sm_90a only) reads the right sides from shared memory without
/// ldmatrix and overlaps with the exponentials of other warps; a second kernel that uses it could keep Hopper's tensor cores busier.
///
/// Everything else: float32 multiply-adds in tiles of 64 x 64 (attention_tile.cuh).
#include "native/cuda/attention_tile.cuh"
#include "native/cuda/kernels.h"

namespace uniflow::cuda {
namespace {

// --- tensor cores -----------------------------------------------------------------------------------------------------------

constexpr int kTiles = 2;                               // fragments of 16 query rows per warp
constexpr int kQueries = tensor::kWarps * kTiles * 16;  // per block
constexpr int kTailKeys = 16;
/// Keys per tile, limited by the registers for their scores.
template <int kWidth>
constexpr int kTileKeys = kWidth <= 80 ? 64 : 32;

/// State of this lane's query rows, lane / 4 + 8 * half of each fragment.
template <int kWidth>
struct Rows {
  float values[kTiles][kWidth / 8][4] = {};
  float maximum[kTiles][2];   // of the scores so far, as exponents of 2; equal in the four lanes of a row
  float sum[kTiles][2] = {};  // of the weights so far, in this lane's columns
};

/// Turns scores into weights, in place, and rescales the previous sums. Keys from `keys` on are missing.
template <int kWidth, int kKeys>
__device__ inline void softmax(float (&score)[kTiles][kKeys / 8][4], int keys, float scale, Rows<kWidth>& rows) {
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = -kInfinity;  // fmaxf drops a NaN, which still reaches the weights
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          if (kKeys == kTailKeys && static_cast<int>(n * 8 + tensor::lane() % 4 * 2 + i % 2) >= keys) score[m][n][i] = -kInfinity;
          largest = fmaxf(largest, score[m][n][i]);
        }
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
      const float maximum = fmaxf(rows.maximum[m][half], largest * scale), rescale = exp2_approx(rows.maximum[m][half] - maximum);
      rows.maximum[m][half] = maximum;
      float sum = rows.sum[m][half] * rescale;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) sum += score[m][n][i] = exp2_approx(fmaf(score[m][n][i], scale, -maximum));
      rows.sum[m][half] = sum;
#pragma unroll
      for (int n = 0; n < kWidth / 8; ++n)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) rows.values[m][n][i] *= rescale;
    }
}

/// Processes the tiles' first kKeys keys, of which `keys` exist.
template <int kKeys, int kWidth, bool kKept>
__device__ inline void attend(const tensor::Left<kTiles, kWidth, kKept>& q, const bf16* k, const bf16* v, int keys, float scale,
                              Rows<kWidth>& rows) {
  float score[kTiles][kKeys / 8][4] = {};
  tensor::multiply_rows<kTiles, kWidth, kKeys>(score, q, k);
  softmax<kWidth, kKeys>(score, keys, scale, rows);
  tensor::multiply_columns<kTiles, kWidth, kKeys>(rows.values, tensor::Weights<kTiles, kKeys>(score), v);
}

/// Divides by the sums and stores the result. `staging`: the warp's rows of a tile.
template <int kWidth>
__device__ inline void finish(Rows<kWidth>& rows, bf16* staging, const HeadSizes& sizes, int head, int first, bf16* out,
                              float* log_sum_exp) {
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = rows.sum[m][half];
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      const float inverse = 1.0f / sum;
#pragma unroll
      for (int n = 0; n < kWidth / 8; ++n)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) rows.values[m][n][i] *= inverse;
      const int token = first + m * 16 + half * 8 + static_cast<int>(tensor::lane() / 4);
      if (log_sum_exp && token < sizes.seq && tensor::lane() % 4 == 0)
        log_sum_exp[int64_t{head} * sizes.seq + token] = rows.maximum[m][half] * kLn2 + logf(sum);
    }
  tensor::store_rows<kTiles, kWidth>(rows.values, 1, staging, out + sizes.in_out(head, first), sizes.out_stride, sizes.seq - first,
                                     sizes.head_dim);
}

/// Shared memory in elements: the queries, and two stages of keys and values.
template <int kWidth>
constexpr int kSharedElements = (kQueries + 4 * kTileKeys<kWidth>) * kWidth;

template <int kWidth>
__global__ void __launch_bounds__(tensor::kThreads, 2) attention_tensor(const bf16* qkv, bf16* out, float* log_sum_exp, HeadSizes sizes) {
  constexpr int kKeys = kTileKeys<kWidth>, kTileElements = kKeys * kWidth, kWarpRows = kTiles * 16;
  bf16 *const queries = dynamic_shared<bf16>(), *const stages = queries + kQueries * kWidth;  // keys, values; keys, values
  bf16* const mine = queries + tensor::warp() * kWarpRows * kWidth;
  const HeadBlock block(sizes, kQueries);
  const int first = block.first + static_cast<int>(tensor::warp()) * kWarpRows;  // of this warp
  const bf16* const key_rows = qkv + sizes.in_qkv(block.head, 0, 1);
  const auto load = [&](int tile, bf16* stage) {
    const bf16* const from = key_rows + int64_t{tile} * kKeys * sizes.qkv_stride;
    const int rows = sizes.seq - tile * kKeys;
    tensor::load_tile<kWidth, kKeys>(stage, from, sizes.qkv_stride, rows, sizes.head_dim);
    tensor::load_tile<kWidth, kKeys>(stage + kTileElements, from + sizes.out_stride, sizes.qkv_stride, rows, sizes.head_dim);
  };
  tensor::load_tile<kWidth, kQueries>(queries, qkv + sizes.in_qkv(block.head, block.first, 0), sizes.qkv_stride, sizes.seq - block.first,
                                      sizes.head_dim);
  tensor::Left<kTiles, kWidth, kWidth <= 64> q;
  Rows<kWidth> rows;
#pragma unroll
  for (int m = 0; m < kTiles; ++m) rows.maximum[m][0] = rows.maximum[m][1] = -kInfinity;
  tensor::for_tiles((sizes.seq + kKeys - 1) / kKeys, stages, 2 * kTileElements, load, [&](int tile, const bf16* k) {
    if (first >= sizes.seq) return;
    if (tile == 0) q.start(mine);
    const bf16* const v = k + kTileElements;
    const int keys = sizes.seq - tile * kKeys;
    if (keys >= kKeys) attend<kKeys>(q, k, v, kKeys, sizes.exponent_scale, rows);
    else
#pragma unroll 1
      for (int key = 0; key < keys; key += kTailKeys)
        attend<kTailKeys>(q, k + key * kWidth, v + key * kWidth, keys - key, sizes.exponent_scale, rows);
  });
  if (first < sizes.seq) finish(rows, mine, sizes, block.head, first, out, log_sum_exp);
}

// --- plain ------------------------------------------------------------------------------------------------------------------

/// Turns scores into weights, in place; rescale: the factors for the rows' previous sums.
__device__ inline void softmax(plain::Square& score, int keys, float scale, float (&maximum)[4], float (&sum)[4], float (&rescale)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float largest = -kInfinity;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (plain::x() + 16 * j >= keys) score[i][j] = -kInfinity;
      largest = fmaxf(largest, score[i][j]);
    }
#pragma unroll
    for (int offset = 8; offset > 0; offset /= 2) largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, offset));
    const float old = maximum[i];
    maximum[i] = fmaxf(old, largest);
    rescale[i] = exp2f((old - maximum[i]) * scale);
    sum[i] *= rescale[i];
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[i] += score[i][j] = exp2f((score[i][j] - maximum[i]) * scale);
  }
}

template <class T>
__global__ void __launch_bounds__(plain::kThreads, 2) attention_plain(const T* qkv, T* out, float* log_sum_exp, HeadSizes sizes) {
  using plain::kSide;
  float *const left = dynamic_shared<float>(), *const right = left + plain::kTileFloats, *const weights = right + plain::kTileFloats;
  const HeadBlock block(sizes, kSide);
  const int head = block.head, head_dim = sizes.head_dim, column = static_cast<int>(blockIdx.y) * kSide;  // first column of this block
  const auto load = [&](float* tile, int part, int token, int e) {
    plain::load_tile(tile, qkv + sizes.in_qkv(head, token, part) + e, sizes.qkv_stride, sizes.seq - token, head_dim - e);
  };
  plain::Square values = {};
  float maximum[4] = {-kInfinity, -kInfinity, -kInfinity, -kInfinity}, sum[4] = {}, rescale[4];
  for (int key = 0; key < sizes.seq; key += kSide) {
    plain::Square score = {};
    for (int e = 0; e < head_dim; e += kSide) {
      __syncthreads();  // all threads have finished with the tiles
      if (key == 0 || head_dim > kSide) load(left, 0, block.first, e);
      load(right, 1, key, e);
      __syncthreads();
      plain::multiply_rows(score, left, right, min(kSide, head_dim - e));
    }
    softmax(score, sizes.seq - key, sizes.exponent_scale, maximum, sum, rescale);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) values[i][j] *= rescale[i];
    plain::store_tile(weights, score);
    __syncthreads();
    load(right, 2, key, column);
    __syncthreads();
    plain::multiply_columns(values, weights, right, min(kSide, sizes.seq - key));
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int offset = 8; offset > 0; offset /= 2) sum[i] += __shfl_xor_sync(kAllLanes, sum[i], offset);
#pragma unroll
    for (int j = 0; j < 4; ++j) values[i][j] *= 1.0f / sum[i];
    const int token = block.first + 4 * plain::y() + i;
    if (log_sum_exp && column == 0 && plain::x() == 0 && token < sizes.seq)
      log_sum_exp[int64_t{head} * sizes.seq + token] = maximum[i] * sizes.scale + logf(sum[i]);
  }
  plain::store_rows(values, 1, out + sizes.in_out(head, block.first) + column, sizes.out_stride, sizes.seq - block.first,
                    head_dim - column);
}

template <class T>
void run_plain(const AttentionArgs& a) {
  const dim3 grid(head_blocks(a, plain::kSide), blocks_for(a.head_dim, plain::kSide));
  launch_with_shared(attention_plain<T>, grid, plain::kThreads, 3 * plain::kTileFloats * sizeof(float), static_cast<const T*>(a.qkv),
                     static_cast<T*>(a.out), a.log_sum_exp, HeadSizes(a));
}

}  // namespace

void attention(const AttentionArgs& a) {
  if (a.dtype == DType::Float32) return run_plain<float>(a);
  if (!tensor::takes(a, {a.qkv, a.out})) return run_plain<bf16>(a);
  tensor::with_width(a.head_dim, [&]<int kWidth>() {
    launch_with_shared(attention_tensor<kWidth>, head_blocks(a, kQueries), tensor::kThreads, kSharedElements<kWidth> * sizeof(bf16),
                       static_cast<const bf16*>(a.qkv), static_cast<bf16*>(a.out), a.log_sum_exp, HeadSizes(a));
  });
}

}  // namespace uniflow::cuda
