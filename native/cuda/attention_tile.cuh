/// Shared by attention and its backward pass: the memory layout of a head's rows, and products of tiles, on tensor cores or with plain
/// multiply-adds.
///
/// A tile is some rows of a head in shared memory, [rows][width]. Everything is built from two products:
///   multiply_rows      sum [m, n] += left [m, width] * tile [n, width]^T    scores, from queries and keys
///   multiply_columns   sum [m, width] += left [m, n] * tile [n, width]      values, from weights and values
/// In both, the tile is the right side. Each thread keeps its part of the sums in registers.
#pragma once

#include <mma.cuh>

#include <cmath>
#include <initializer_list>

#include "native/cuda/device.cuh"

namespace uniflow::cuda {

constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;
constexpr float kInfinity = INFINITY;

constexpr int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

/// Sizes of a call. Head indices run over the batch: image * heads + head.
struct HeadSizes {
  template <class Args>
  explicit HeadSizes(const Args& a)
      : seq(static_cast<int>(a.seq)), heads(static_cast<int>(a.heads)), head_dim(static_cast<int>(a.head_dim)),
        out_stride(heads * head_dim), qkv_stride(3 * out_stride), scale(a.scale), exponent_scale(a.scale * kLog2E) {}

  /// Offset of a token's row of a head in out or d_out, [B, S, H*E].
  __device__ int64_t in_out(int head, int token) const {
    return (int64_t{head / heads} * seq + token) * out_stride + head % heads * head_dim;
  }
  /// The same, in part q (0), k (1) or v (2) of [B, S, 3*H*E].
  __device__ int64_t in_qkv(int head, int token, int part) const {
    return (int64_t{head / heads} * seq + token) * qkv_stride + part * out_stride + head % heads * head_dim;
  }

  int seq, heads, head_dim, out_stride, qkv_stride;  // strides: elements between tokens
  float scale, exponent_scale;                       // scale of the scores; of the exponents of 2
};

/// The blocks of a grid, each with `rows` tokens of one head. Blocks of one head are neighbours, so its keys stay in the second-level
/// cache.
struct HeadBlock {
  __device__ HeadBlock(const HeadSizes& sizes, int rows) {
    const int blocks = (sizes.seq + rows - 1) / rows;
    head = static_cast<int>(blockIdx.x) / blocks;
    first = static_cast<int>(blockIdx.x) % blocks * rows;
  }
  int head, first;  // first token
};

template <class Args>
unsigned head_blocks(const Args& a, int64_t rows) {
  return static_cast<unsigned>(a.batch * a.heads) * blocks_for(a.seq, rows);
}

/// launch() for a kernel that may need more dynamic shared memory than the default limit.
template <class... Params, class... Args>
void launch_with_shared(void (*kernel)(Params...), dim3 grid, int threads, size_t bytes, Args&&... args) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)), "cudaFuncSetAttribute");
  launch(kernel, grid, static_cast<unsigned>(threads), bytes, std::forward<Args>(args)...);
}

// --- bfloat16 on tensor cores -----------------------------------------------------------------------------------------------
//
// Four warps, each with 16 * kTiles rows of the left side. Every fragment read from a tile serves kTiles products, because mma.sync is
// limited by shared memory. Head widths are padded with zero columns to kWidth.

namespace tensor {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;

/// Whether a call can use this path, which copies whole rows in pieces of 16 bytes.
template <class Args>
bool takes(const Args& a, std::initializer_list<const void*> pointers) {
  bool aligned = a.dtype == DType::BFloat16 && a.head_dim % 8 == 0 && a.head_dim <= 128;
  for (const void* p : pointers) aligned = aligned && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  return aligned;
}

/// Calls body.operator()<kWidth>() with the padded head width. The widths of the published models (64, 72, 80, 88, 96, 128) need little
/// padding.
template <class Body>
void with_width(int64_t head_dim, Body&& body) {
  if (head_dim <= 32) body.template operator()<32>();
  else if (head_dim <= 64) body.template operator()<64>();
  else if (head_dim <= 80) body.template operator()<80>();
  else if (head_dim <= 96) body.template operator()<96>();
  else body.template operator()<128>();
}

__device__ inline unsigned lane() { return threadIdx.x % kWarp; }
__device__ inline unsigned warp() { return threadIdx.x / kWarp; }

/// Offset of `column`, a multiple of 8, in a row of a tile. The 16-byte pieces of a row are permuted by the row's number modulo 8, so the
/// pieces of eight rows in one column, which one instruction reads, are in different banks. Unsigned, so the compiler can hoist the part
/// that is the same in every lane.
template <int kWidth>
__device__ inline unsigned tile_offset(unsigned row, unsigned column) {
  constexpr unsigned kPieces = kWidth / 8, kPower = kPieces & (~kPieces + 1), kSwapped = kPower < 8 ? kPower : 8;
  return row * kWidth + (column / 8 ^ row / (8 / kSwapped) % kSwapped) * 8;
}

/// Starts copying a head's rows, `stride` elements apart, into a tile of kRows. Missing rows and columns become zeros.
template <int kWidth, int kRows>
__device__ inline void load_tile(bf16* tile, const bf16* from, int stride, int rows, int head_dim) {
  constexpr unsigned kLanes = kWidth % 64 == 0 ? 8 : 4, kStep = kThreads / kLanes;  // lanes per row; rows at a time
  const unsigned lane_row = threadIdx.x / kLanes, lane_column = threadIdx.x % kLanes * 8;
  from += lane_row * stride + lane_column;
#pragma unroll
  for (unsigned row = 0; row < kRows; row += kStep, from += kStep * stride)
#pragma unroll
    for (unsigned column = 0; column < kWidth; column += kLanes * 8) {
      if (kWidth % (kLanes * 8) != 0 && column + lane_column >= kWidth) continue;
      const bool valid = static_cast<int>(row + lane_row) < rows && static_cast<int>(column + lane_column) < head_dim;
      cp_async_16(tile + tile_offset<kWidth>(row + lane_row, column + lane_column), from + column, valid);
    }
}

/// Calls load(tile, stage), then work(tile, stage) for each tile, while the next one is being loaded: two stages.
template <class Load, class Work>
__device__ inline void for_tiles(int tiles, bf16* stages, int stage_elements, const Load& load, const Work& work) {
  load(0, stages);
  cp_async_commit();  // together with everything loaded before
  for (int tile = 0; tile < tiles; ++tile) {
    cp_async_wait<0>();
    __syncthreads();  // all threads see this tile and have finished with the previous one
    if (tile + 1 < tiles) load(tile + 1, stages + (tile + 1) % 2 * stage_elements);
    cp_async_commit();
    work(tile, stages + tile % 2 * stage_elements);
  }
}

/// The first 16 * kTiles rows of a tile as the left side of multiply_rows. kKept: they stay in registers instead of being read again each
/// time.
template <int kTiles, int kWidth, bool kKept>
class Left {
 public:
  static constexpr int kSteps = kWidth / 16;

  __device__ void start(const bf16* tile) {
    tile_ = tile;
    if constexpr (kKept)
#pragma unroll
      for (int step = 0; step < kSteps; ++step) read(step, kept_[step]);
  }

  /// Columns [16 * step, 16 * step + 16).
  __device__ void get(int step, uint32_t (&a)[kTiles][4]) const {
    if constexpr (kKept) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int r = 0; r < 4; ++r) a[m][r] = kept_[step][m][r];
    } else {
      read(step, a);
    }
  }

 private:
  __device__ void read(int step, uint32_t (&a)[kTiles][4]) const {
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
      ldmatrix_x4(a[m], tile_ + tile_offset<kWidth>(m * 16 + lane() % 16, step * 16 + lane() / 16 * 8));
  }

  const bf16* tile_;
  uint32_t kept_[kKept ? kSteps : 1][kTiles][4];
};

/// The tile's first kColumns rows give the columns of the sums.
template <int kTiles, int kWidth, int kColumns, bool kKept>
__device__ inline void multiply_rows(float (&sum)[kTiles][kColumns / 8][4], const Left<kTiles, kWidth, kKept>& left, const bf16* tile) {
#pragma unroll
  for (int step = 0; step < kWidth / 16; ++step) {
    uint32_t a[kTiles][4];
    left.get(step, a);
#pragma unroll
    for (int n = 0; n < kColumns / 16; ++n) {
      uint32_t b[4];  // rows 0-7, columns 0-7 and 8-15 of the tile's 16 x 16; then rows 8-15
      ldmatrix_x4(b, tile + tile_offset<kWidth>(n * 16 + lane() / 16 * 8 + lane() % 8, step * 16 + lane() / 8 % 2 * 8));
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        mma_m16n8k16(sum[m][2 * n], a[m], b[0], b[1]);
        mma_m16n8k16(sum[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

/// Rounds sums to bfloat16, as a left side.
template <int kTiles, int kColumns>
struct Weights {
  __device__ explicit Weights(const float (&sum)[kTiles][kColumns / 8][4]) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        a[m][n / 2][n % 2 * 2] = pack_bf16(sum[m][n][0], sum[m][n][1]);
        a[m][n / 2][n % 2 * 2 + 1] = pack_bf16(sum[m][n][2], sum[m][n][3]);
      }
  }
  uint32_t a[kTiles][kColumns / 16][4];
};

/// The tile's first kColumns rows correspond to the columns of the weights.
template <int kTiles, int kWidth, int kColumns>
__device__ inline void multiply_columns(float (&sum)[kTiles][kWidth / 8][4], const Weights<kTiles, kColumns>& left, const bf16* tile) {
#pragma unroll
  for (int step = 0; step < kColumns / 16; ++step)
#pragma unroll
    for (int n = 0; n < kWidth / 16; ++n) {
      uint32_t b[4];  // columns 0-7, rows 0-7 and 8-15 of the tile's 16 x 16; then columns 8-15
      ldmatrix_x4_trans(b, tile + tile_offset<kWidth>(step * 16 + lane() % 16, n * 16 + lane() / 16 * 8));
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        mma_m16n8k16(sum[m][2 * n], left.a[m][step], b[0], b[1]);
        mma_m16n8k16(sum[m][2 * n + 1], left.a[m][step], b[2], b[3]);
      }
    }
}

/// Writes sum * factor as bfloat16 to `rows` rows of a head, through shared memory, in 16-byte pieces. `staging`: the warp's rows of a
/// tile, [16 * kTiles], which no other warp reads.
template <int kTiles, int kWidth>
__device__ inline void store_rows(const float (&sum)[kTiles][kWidth / 8][4], float factor, bf16* staging, bf16* to, int stride, int rows,
                                  int head_dim) {
  constexpr int kPieces = kWidth / 8;
  __syncwarp();  // all lanes have read the old content
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        bf16* const at = staging + tile_offset<kWidth>(m * 16 + half * 8 + lane() / 4, n * 8) + lane() % 4 * 2;
        *reinterpret_cast<uint32_t*>(at) = pack_bf16(sum[m][n][2 * half] * factor, sum[m][n][2 * half + 1] * factor);
      }
  __syncwarp();
  for (int at = static_cast<int>(lane()); at < kTiles * 16 * kPieces; at += kWarp) {
    const int row = at / kPieces, column = at % kPieces * 8;
    if (row >= rows || column >= head_dim) continue;
    *reinterpret_cast<uint4*>(to + row * stride + column) = *reinterpret_cast<const uint4*>(staging + tile_offset<kWidth>(row, column));
  }
}

}  // namespace tensor

// --- plain multiply-adds: float32, and bfloat16 of other widths ----------------------------------------------------------------
//
// 256 threads form a 16 x 16 grid, thread (y, x) = (t / 16, t % 16). Tiles are [64][64] float32 and hold 64 columns of the head at a time.
// A thread has 4 x 4 elements of a 64 x 64 product: rows 4y + i, and columns x + 16j in multiply_rows, 4x + j in multiply_columns. A block
// computes 64 columns of the output; the scores of wider heads are computed once per 64 columns.

namespace plain {

constexpr int kThreads = 256, kSide = 64;
constexpr int kStride = kSide + 4;  // row stride of a tile: rows read together are in different banks
constexpr int kTileFloats = kSide * kStride;

using Square = float[4][4];

__device__ inline int x() { return static_cast<int>(threadIdx.x) % 16; }
__device__ inline int y() { return static_cast<int>(threadIdx.x) / 16; }

/// Loads `rows` rows of `columns` elements; the rest of the tile becomes zeros.
template <class T>
__device__ inline void load_tile(float* tile, const T* from, int stride, int rows, int columns) {
  const int column = static_cast<int>(threadIdx.x) % kSide, first = static_cast<int>(threadIdx.x) / kSide;
#pragma unroll 4  // keeps 4 loads in flight
  for (int row = first; row < kSide; row += kThreads / kSide)
    tile[row * kStride + column] = row < rows && column < columns ? to_f32(from[row * stride + column]) : 0.0f;
}

__device__ inline float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }

/// sum += a b^T over the first `depth` columns.
__device__ inline void multiply_rows(Square& sum, const float* a, const float* b, int depth) {
  a += 4 * y() * kStride;
  b += x() * kStride;
#pragma unroll 1
  for (int e = 0; e < depth; e += 4) {
    float4 right[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) right[j] = load4(b + 16 * j * kStride + e);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 left = load4(a + i * kStride + e);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        sum[i][j] += left.x * right[j].x + left.y * right[j].y + left.z * right[j].z + left.w * right[j].w;
    }
  }
}

/// sum += a b over the first `depth` rows of b.
__device__ inline void multiply_columns(Square& sum, const float* a, const float* b, int depth) {
  a += 4 * y() * kStride;
  b += 4 * x();
#pragma unroll 1
  for (int k = 0; k < depth; k += 4) {
    float4 right[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) right[r] = load4(b + (k + r) * kStride);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 left = load4(a + i * kStride + k);
      sum[i][0] += left.x * right[0].x + left.y * right[1].x + left.z * right[2].x + left.w * right[3].x;
      sum[i][1] += left.x * right[0].y + left.y * right[1].y + left.z * right[2].y + left.w * right[3].y;
      sum[i][2] += left.x * right[0].z + left.y * right[1].z + left.z * right[2].z + left.w * right[3].z;
      sum[i][3] += left.x * right[0].w + left.y * right[1].w + left.z * right[2].w + left.w * right[3].w;
    }
  }
}

/// Stores the result of multiply_rows as a left side of multiply_columns.
__device__ inline void store_tile(float* tile, const Square& sum) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) tile[(4 * y() + i) * kStride + x() + 16 * j] = sum[i][j];
}

/// Writes the result of multiply_columns, times a factor, to `rows` rows of `columns` elements.
template <class T>
__device__ inline void store_rows(const Square& sum, float factor, T* to, int stride, int rows, int columns) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (4 * y() + i < rows && 4 * x() + j < columns)
        to[(4 * y() + i) * stride + 4 * x() + j] = from_f32<T>(sum[i][j] * factor);
}

}  // namespace plain
}  // namespace uniflow::cuda
