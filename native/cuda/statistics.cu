/// The k largest of each row, and the covariance of columns.
///
/// top_k: a block has a row. A score and its index form a 64-bit key, larger for a larger score and, among equal scores, for a lower index,
/// so all keys are distinct. The k-th largest key is found byte by byte, from the highest, by a histogram of the next byte. Then the keys
/// that are not smaller are collected and sorted. Roofline bound: the scores read once; they are actually read about five times, mostly
/// from the second-level cache.
///
/// covariance: a product of the centred matrix with itself, in float64 because FID subtracts nearly equal matrices. A block sums a 64 x 64
/// tile of the upper triangle over all rows, in order; a thread has 4 x 4 of it in registers. FLOPs: N*D*(D+1) in float64.
#include <algorithm>
#include <bit>

#include "native/cuda/device.cuh"
#include "native/cuda/kernels.h"

namespace uniflow::cuda {
namespace {

// --- top_k --------------------------------------------------------------------------------------------------------

constexpr int kThreads = 1024;
constexpr int kBuckets = 256;
constexpr int64_t kSharedKeys = 2048;

/// Decreases in the requested order. NaN counts as minus infinity, and both zeros are equal.
__device__ inline uint64_t key_of(float score, int64_t index) {
  const unsigned bits = __float_as_uint(score != score ? -INFINITY : score + 0.0f);
  const unsigned rising = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return uint64_t{rising} << 32 | static_cast<uint32_t>(~static_cast<uint32_t>(index));
}

/// Adds one to the buckets of all lanes that are `in`. Scores share their top bytes, so most lanes of a warp have the same bucket, and one
/// addition counts all of these.
__device__ inline void count_buckets(unsigned* counts, bool in, int bucket) {
  const unsigned active = __ballot_sync(kAllLanes, in);
  if (active == 0) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, first = __ffs(static_cast<int>(active)) - 1, common = __shfl_sync(kAllLanes, bucket, first);
  const unsigned same = __ballot_sync(kAllLanes, in && bucket == common);
  if (lane == first) atomicAdd(&counts[common], static_cast<unsigned>(__popc(same)));
  else if (in && bucket != common) atomicAdd(&counts[bucket], 1u);
}

/// The state of the search for the k-th largest key after some bytes.
struct Search {
  uint64_t prefix;     // the known bytes, zeros below
  unsigned remaining;  // number of keys with this prefix among the k largest
  bool exact;          // all keys with this prefix are among them
};

/// Finds the next byte, at `shift`, from the counts of its values. Called by the first warp: the first lane has the 8 highest values.
__device__ inline void narrow(Search& search, const unsigned* counts, int shift) {
  constexpr int kEach = kBuckets / kWarp;
  const int lane = static_cast<int>(threadIdx.x), high = kBuckets - 1 - lane * kEach;
  const unsigned remaining = search.remaining;
  unsigned own = 0;
  for (int i = 0; i < kEach; ++i) own += counts[high - i];
  unsigned up_to = own;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const unsigned other = __shfl_up_sync(kAllLanes, up_to, static_cast<unsigned>(offset));
    if (lane >= offset) up_to += other;
  }
  unsigned above = up_to - own;
  __syncwarp();  // all lanes have read `remaining`
  if (above >= remaining || up_to < remaining) return;
  int value = high;
  for (; above + counts[value] < remaining; --value) above += counts[value];
  search = {search.prefix | static_cast<uint64_t>(value) << shift, remaining - above, counts[value] == remaining - above};
}

/// Writes to `search` the k-th largest key of a row, or a smaller number with no key in between.
__device__ inline void find_threshold(const float* scores, int64_t n, int64_t k, Search& search, unsigned* counts) {
  const int tid = static_cast<int>(threadIdx.x);
  if (tid == 0) search = {0, static_cast<unsigned>(k), false};
  for (int shift = 56; shift >= 0; shift -= 8) {
    if (tid < kBuckets) counts[tid] = 0;
    __syncthreads();
    const uint64_t prefix = search.prefix, known = shift == 56 ? 0 : ~uint64_t{0} << (shift + 8);
    for (int64_t begin = 0; begin < n; begin += kThreads) {  // all threads take part in every round
      const int64_t i = begin + tid;
      const uint64_t key = i < n ? key_of(scores[i], i) : 0;
      count_buckets(counts, i < n && (key & known) == prefix, static_cast<int>(key >> shift & (kBuckets - 1)));
    }
    __syncthreads();
    if (tid < kWarp) narrow(search, counts, shift);
    __syncthreads();
    if (search.exact) return;
  }
}

/// Bitonic sort of a power-of-two number of keys, descending.
__device__ inline void sort_keys(uint64_t* keys, int64_t count) {
  for (int64_t size = 2; size <= count; size *= 2)
    for (int64_t stride = size / 2; stride > 0; stride /= 2) {
      __syncthreads();
      for (int64_t i = threadIdx.x; i < count / 2; i += kThreads) {
        const int64_t low = 2 * i - (i & (stride - 1)), high = low + stride;
        const uint64_t a = keys[low], b = keys[high];
        if ((a < b) == ((low & size) == 0)) keys[low] = b, keys[high] = a;
      }
    }
  __syncthreads();
}

/// `spill`: memory for `padded` keys per block if shared memory is too small, or null.
__global__ void __launch_bounds__(kThreads) top_k_kernel(const float* scores, int64_t rows, int64_t n, int64_t k, int64_t padded, uint64_t* spill,
                                                         float* values, int32_t* indices) {
  __shared__ unsigned counts[kBuckets], gathered;
  __shared__ Search search;
  uint64_t* keys = spill ? spill + blockIdx.x * padded : dynamic_shared<uint64_t>();
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const float* s = scores + row * n;
    find_threshold(s, n, k, search, counts);  // its barriers separate the keys of one row from those of the next
    if (threadIdx.x == 0) gathered = 0;
    for (int64_t i = k + threadIdx.x; i < padded; i += kThreads) keys[i] = 0;  // smaller than any key
    __syncthreads();
    for (int64_t i = threadIdx.x; i < n; i += kThreads)
      if (const uint64_t key = key_of(s[i], i); key >= search.prefix) keys[atomicAdd(&gathered, 1u)] = key;
    sort_keys(keys, padded);
    for (int64_t i = threadIdx.x; i < k; i += kThreads) {
      const auto index = static_cast<int32_t>(~static_cast<uint32_t>(keys[i]));
      values[row * k + i] = s[index];
      indices[row * k + i] = index;
    }
  }
}

// --- covariance ---------------------------------------------------------------------------------------------------

constexpr int kTile = 64, kSide = 16, kEach = kTile / kSide;  // a tile has kSide x kSide threads with kEach x kEach sums each
constexpr int kStep = 16;                                     // rows in shared memory
constexpr int kSumRows = 8;                                   // vertically adjacent threads that sum columns
constexpr int64_t kChunk = 1024;                              // rows summed by a block

/// sums [chunks, width] of the columns.
__global__ void __launch_bounds__(kWarp* kSumRows) column_sum_kernel(const float* x, int64_t rows, int64_t width, double* sums) {
  __shared__ double part[kSumRows][kWarp];
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kWarp + threadIdx.x, begin = static_cast<int64_t>(blockIdx.x) * kChunk;
  const int64_t end = min(begin + kChunk, rows);
  double total = 0;
  if (column < width)
    for (int64_t r = begin + threadIdx.y; r < end; r += kSumRows) total += static_cast<double>(x[r * width + column]);
  part[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y != 0 || column >= width) return;
  for (int i = 1; i < kSumRows; ++i) total += part[i][threadIdx.x];
  sums[blockIdx.x * width + column] = total;
}

__global__ void mean_kernel(const double* sums, int64_t chunks, int64_t rows, int64_t width, double* centre, float* mean) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= width) return;
  double total = 0;
  for (int64_t i = 0; i < chunks; ++i) total += sums[i * width + column];
  centre[column] = total / static_cast<double>(rows);
  mean[column] = static_cast<float>(centre[column]);
}

/// This thread's share of kStep rows of a tile's columns. Its column never changes, so its mean is kept.
struct Panel {
  const float* x;
  int64_t width, column;
  bool inside;
  double centre;
  float next[kEach];

  __device__ Panel(const float* x, int64_t width, int64_t tile, const double* centres)
      : x(x), width(width), column(tile * kTile + threadIdx.x % kTile), inside(column < width), centre(inside ? centres[column] : 0) {}
  __device__ int row(int i) const { return static_cast<int>(threadIdx.x) / kTile + i * (kSide * kSide / kTile); }
  /// Prefetches the rows from `first` on.
  __device__ void fetch(int64_t first, int64_t rows) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) next[i] = inside && first + row(i) < rows ? x[(first + row(i)) * width + column] : 0;
  }
  __device__ void put(int64_t first, int64_t rows, double (*to)[kTile]) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) to[row(i)][threadIdx.x % kTile] = inside && first + row(i) < rows ? static_cast<double>(next[i]) - centre : 0;
  }
};

__global__ void __launch_bounds__(kSide* kSide) covariance_kernel(const float* x, int64_t rows, int64_t width, const double* centre, float* out) {
  __shared__ double left[kStep][kTile], right[kStep][kTile];
  if (blockIdx.x < blockIdx.y) return;
  const int tx = static_cast<int>(threadIdx.x) % kSide, ty = static_cast<int>(threadIdx.x) / kSide;
  Panel a(x, width, blockIdx.y, centre), b(x, width, blockIdx.x, centre);
  double total[kEach][kEach] = {};
  a.fetch(0, rows), b.fetch(0, rows);
  for (int64_t first = 0; first < rows; first += kStep) {
    __syncthreads();  // all threads have used the previous rows
    a.put(first, rows, left), b.put(first, rows, right);
    __syncthreads();
    a.fetch(first + kStep, rows), b.fetch(first + kStep, rows);
#pragma unroll 4
    for (int r = 0; r < kStep; ++r)
#pragma unroll
      for (int i = 0; i < kEach; ++i)
#pragma unroll
        for (int j = 0; j < kEach; ++j) total[i][j] += left[r][ty + i * kSide] * right[r][tx + j * kSide];
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i)
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int64_t row = static_cast<int64_t>(blockIdx.y) * kTile + ty + i * kSide, column = static_cast<int64_t>(blockIdx.x) * kTile + tx + j * kSide;
      if (row >= width || column >= width) continue;
      out[row * width + column] = out[column * width + row] = static_cast<float>(total[i][j] / static_cast<double>(rows - 1));
    }
}

Tensor doubles(int64_t n) { return scratch(DType::Float32, {2 * n}); }

}  // namespace

void top_k(const float* scores, int64_t rows, int64_t n, int64_t k, float* values, int32_t* indices) {
  if (rows == 0) return;
  const auto padded = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(k)));
  if (padded <= kSharedKeys) {
    launch(top_k_kernel, static_cast<unsigned>(rows), kThreads, static_cast<size_t>(padded) * sizeof(uint64_t), scores, rows, n, k, padded, nullptr, values,
           indices);
    return;
  }
  const int64_t blocks = std::min<int64_t>(rows, 2 * properties().multiprocessors);  // as many as run at a time, because their keys take memory
  const Tensor spill = doubles(blocks * padded);
  launch(top_k_kernel, static_cast<unsigned>(blocks), kThreads, 0, scores, rows, n, k, padded, spill.data<uint64_t>(), values, indices);
}

void covariance(const float* x, int64_t rows, int64_t width, float* mean, float* out) {
  const unsigned chunks = blocks_for(rows, kChunk), tiles = blocks_for(width, kTile);
  const Tensor sums = doubles(chunks * width), centre = doubles(width);
  launch(column_sum_kernel, dim3(chunks, blocks_for(width, kWarp)), dim3(kWarp, kSumRows), 0, x, rows, width, sums.data<double>());
  launch(mean_kernel, blocks_for(width, 256), 256, 0, sums.data<double>(), int64_t{chunks}, rows, width, centre.data<double>(), mean);
  launch(covariance_kernel, dim3(tiles, tiles), kSide * kSide, 0, x, rows, width, centre.data<double>(), out);
}

}  // namespace uniflow::cuda
