/// PSNR and SSIM of pairs of images, as in native/cpu/quality.cpp. Squares are summed exactly and windows in float64, because variances are
/// small differences of large numbers.
///
/// SSIM: a block has 32 x 16 windows of an image, all channels. The pixels go to shared memory, are averaged there along the rows into
/// moments, then along the columns. PSNR: a block has 64 KiB of an image. One more block per image adds up the blocks' sums. Roofline
/// bound: float64 arithmetic, about 300 FLOPs per value.
#include <limits>

#include "native/cuda/kernels.h"
#include "native/cuda/vectors.cuh"

namespace uniflow::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMoments = 5;                // of a, b, a*a, b*b, a*b
constexpr int kColumns = 32, kRows = 16;   // windows per block
template <int kSize>
constexpr int kLines = kRows + kSize - 1;  // pixels per block, for windows of kSize x kSize
template <int kSize>
constexpr int kLine = 3 * (kColumns + kSize - 1);
constexpr int64_t kChunk = 64 << 10;

/// The windows of an image, and the tiles that cover them.
struct Windows {
  int64_t rows, columns;
  int down, across;
  int64_t tiles() const { return int64_t{down} * across; }
};

Windows windows_of(int64_t height, int64_t width, int size) {
  if (height < size || width < size) return {0, 0, 0, 0};
  const int64_t rows = height - size + 1, columns = width - size + 1;
  return {rows, columns, static_cast<int>(blocks_for(rows, kRows)), static_cast<int>(blocks_for(columns, kColumns))};
}

template <int kSize>
__device__ inline double window_ssim(const double (&m)[kMoments], const SsimWindow<kSize>& w) {
  const double va = w.unbiased * (m[2] - m[0] * m[0]), vb = w.unbiased * (m[3] - m[1] * m[1]), cov = w.unbiased * (m[4] - m[0] * m[1]);
  return ((2 * m[0] * m[1] + w.c1) * (2 * cov + w.c2)) / ((m[0] * m[0] + m[1] * m[1] + w.c1) * (va + vb + w.c2));
}

/// Loads lines of a tile, starting at its upper left corner; pixels outside the image are zero and not used.
template <int kHeight, int kWidth>
__device__ inline void load_lines(const uint8_t* picture, int64_t height, int64_t width, int64_t top, int64_t left, uint8_t (&to)[kHeight][kWidth]) {
  for (int i = static_cast<int>(threadIdx.x); i < kHeight * kWidth; i += kThreads) {
    const int64_t y = top + i / kWidth, at = left * 3 + i % kWidth;
    to[i / kWidth][i % kWidth] = y < height && at < width * 3 ? picture[y * width * 3 + at] : 0;
  }
}

/// Adds the moments of the pixels at p and q, and of those to the right of them in the window.
template <int kSize>
__device__ inline void average_pixels(const uint8_t* p, const uint8_t* q, const SsimWindow<kSize>& w, double (&m)[kMoments]) {
#pragma unroll
  for (int k = 0; k < kSize; ++k) {
    const double a = p[k * 3], b = q[k * 3], ga = w.weight[k] * a, gb = w.weight[k] * b;
    m[0] += ga, m[1] += gb, m[2] += ga * a, m[3] += gb * b, m[4] += ga * b;
  }
}

/// sums [images, tiles] of the windows' SSIM.
template <int kSize>
__global__ void __launch_bounds__(kThreads) ssim_kernel(const uint8_t* a, const uint8_t* b, int64_t height, int64_t width, Windows windows,
                                                        SsimWindow<kSize> w, double* sums) {
  __shared__ uint8_t left_lines[kLines<kSize>][kLine<kSize>], right_lines[kLines<kSize>][kLine<kSize>];
  __shared__ double moments[kMoments][kLines<kSize>][kColumns];
  const int64_t tiles = int64_t{windows.down} * windows.across, image = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int64_t top = tile / windows.across * kRows, left = tile % windows.across * kColumns, bytes = height * width * 3;
  load_lines(a + image * bytes, height, width, top, left, left_lines);
  load_lines(b + image * bytes, height, width, top, left, right_lines);
  double total = 0;
  for (int channel = 0; channel < 3; ++channel) {
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kLines<kSize> * kColumns; i += kThreads) {
      const int y = i / kColumns, x = i % kColumns;
      double m[kMoments] = {};
      average_pixels(&left_lines[y][x * 3 + channel], &right_lines[y][x * 3 + channel], w, m);
      for (int j = 0; j < kMoments; ++j) moments[j][y][x] = m[j];
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kRows * kColumns; i += kThreads) {
      const int y = i / kColumns, x = i % kColumns;
      if (top + y >= windows.rows || left + x >= windows.columns) continue;
      double m[kMoments] = {};
#pragma unroll
      for (int k = 0; k < kSize; ++k)
        for (int j = 0; j < kMoments; ++j) m[j] += w.weight[k] * moments[j][y + k][x];
      total += window_ssim(m, w);
    }
  }
  total = block_sum(total);
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

/// sums [images, chunks] of the squared differences.
template <int V>
__global__ void __launch_bounds__(kThreads) squares_kernel(const uint8_t* a, const uint8_t* b, int64_t bytes, int64_t chunks, int64_t* sums) {
  const int64_t image = blockIdx.x / chunks, begin = blockIdx.x % chunks * kChunk, end = min(begin + kChunk, bytes);
  int64_t total = 0;
  for (int64_t i = begin + int64_t{V} * threadIdx.x; i < end; i += V * kThreads) {
    const auto p = *reinterpret_cast<const Pack<uint8_t, V>*>(a + image * bytes + i), q = *reinterpret_cast<const Pack<uint8_t, V>*>(b + image * bytes + i);
    int squares = 0;
#pragma unroll
    for (int k = 0; k < V; ++k) squares += (int{p.v[k]} - q.v[k]) * (int{p.v[k]} - q.v[k]);
    total += squares;
  }
  total = block_sum(total);
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

/// out [images, 2] from the sums; one block per image.
__global__ void __launch_bounds__(kThreads) finish_kernel(const int64_t* squares, int64_t chunks, int64_t values, const double* ssim, int64_t tiles,
                                                          int64_t windows, float* out) {
  const int64_t image = blockIdx.x;
  int64_t error = 0;
  double similarity = 0;
  for (int64_t i = threadIdx.x; i < chunks; i += kThreads) error += squares[image * chunks + i];
  for (int64_t i = threadIdx.x; i < tiles; i += kThreads) similarity += ssim[image * tiles + i];
  error = block_sum(error);
  similarity = block_sum(similarity);
  if (threadIdx.x != 0) return;
  const double psnr = 10 * log10(255.0 * 255.0 * static_cast<double>(values) / static_cast<double>(error));
  out[image * 2] = error == 0 ? INFINITY : static_cast<float>(psnr);
  out[image * 2 + 1] = static_cast<float>(similarity / (3 * static_cast<double>(windows)));  // NaN if there is no window
}

template <int kSize>
void image_quality(const uint8_t* a, const uint8_t* b, float* out, int64_t images, int64_t height, int64_t width, const SsimWindow<kSize>& window) {
  const Windows w = windows_of(height, width, kSize);
  const int64_t bytes = height * width * 3, chunks = blocks_for(bytes, kChunk);
  const Tensor squares = scratch(DType::Float32, {2 * images * chunks}), ssim = scratch(DType::Float32, {2 * images * w.tiles()});
  const bool whole = bytes % 16 == 0 && aligned({a, b});
  launch(whole ? squares_kernel<16> : squares_kernel<1>, static_cast<unsigned>(images * chunks), kThreads, 0, a, b, bytes, chunks, squares.data<int64_t>());
  launch(ssim_kernel<kSize>, static_cast<unsigned>(images * w.tiles()), kThreads, 0, a, b, height, width, w, window, ssim.data<double>());
  launch(finish_kernel, static_cast<unsigned>(images), kThreads, 0, squares.data<int64_t>(), chunks, bytes, ssim.data<double>(), w.tiles(),
         w.rows * w.columns, out);
}

}  // namespace

void image_quality(const uint8_t* a, const uint8_t* b, float* out, int64_t images, int64_t height, int64_t width, SsimConvention convention) {
  if (images == 0) return;
  with_ssim_window(convention, [&](const auto& window) { image_quality(a, b, out, images, height, width, window); });
}

}  // namespace uniflow::cuda
