/// Conversions between pixels, patch vectors and tokens: unfold, fold, assemble, and resizing of position tables. All are memory-bound: the
/// roofline bound is the bytes read plus the bytes written.
///
/// unfold and fold: a block reorders a tile, which is some neighbouring patches of one row of patches. The patch vectors of a tile are one
/// contiguous run of memory, its pixels p runs (3p if channels are planes). The pixels go through shared memory, so both sides are accessed
/// as runs. assemble: a warp moves a token. Resizing: a block computes one position of the table. The host provides the source positions
/// and weights, and for the gradient the transposed lists.
#include <algorithm>
#include <cmath>
#include <vector>

#include "native/core/bicubic.h"
#include "native/cuda/kernels.h"
#include "native/cuda/vectors.cuh"

namespace uniflow::cuda {
namespace {

// --- pixels -------------------------------------------------------------------------------------------------------

constexpr int kThreads = 256;
constexpr int64_t kTileBytes = 16 << 10;    // small enough for several blocks per multiprocessor
constexpr int64_t kSharedBytes = 48 << 10;  // the default limit of a block

/// Cuts images into tiles.
struct Tiling {
  int64_t height, width;
  int patch, columns;       // number of patches in a row
  int per_tile, tiles;      // patches per tile; tiles per row
  int64_t stride, shared;   // bytes per line in shared memory, and in total; shared = 0: the patch is too large, pixels are accessed directly
};

/// Packed pixels are bytes, channels last; planes are float.
template <class P>
constexpr bool kPacked = sizeof(P) == 1;

template <class P>
Tiling tiling_of(int64_t height, int64_t width, int64_t patch) {
  const int64_t columns = width / patch, patch_bytes = 3 * patch * patch * static_cast<int64_t>(sizeof(P));
  int64_t per_tile = std::clamp<int64_t>(kTileBytes / patch_bytes, 1, columns);
  for (const int64_t even : {16, 4})  // tiles that begin at multiples of 16 bytes
    if (per_tile < columns && per_tile > even) per_tile -= per_tile % even;
  // lines end 16 bytes after a multiple of 128, so vertically adjacent pixels are in different banks
  const int64_t line = patch_bytes / patch / (kPacked<P> ? 1 : 3) * per_tile, stride = (line + 127) / 128 * 128 + 16;
  const int64_t shared = stride * patch * (kPacked<P> ? 1 : 3);
  return {height, width, static_cast<int>(patch), static_cast<int>(columns), static_cast<int>(per_tile),
          static_cast<int>((columns + per_tile - 1) / per_tile), stride, shared <= kSharedBytes ? shared : 0};
}

/// The pixels of a tile: a pointer to its upper left corner, and the distance in elements to the next channel, line and column.
template <class P>
struct Pixels {
  P* at;
  int64_t channel, line;
  int step;
};

template <class P>
__device__ Pixels<P> pixels_in_picture(const Tiling& t, P* pictures, int64_t row, int column) {
  const int64_t rows = t.height / t.patch, image = row / rows, top = row % rows * t.patch, left = int64_t{column} * t.patch;
  if constexpr (kPacked<P>) return {pictures + ((image * t.height + top) * t.width + left) * 3, 1, t.width * 3, 3};
  else return {pictures + (image * 3 * t.height + top) * t.width + left, t.height * t.width, t.width, 1};
}

template <class P>
__device__ Pixels<P> pixels_in_shared(const Tiling& t) {
  const int64_t line = t.stride / static_cast<int64_t>(sizeof(P));
  return {dynamic_shared<P>(), kPacked<P> ? 1 : line * t.patch, line, kPacked<P> ? 3 : 1};
}

/// Copies all lines of `count` patches, one after the other, as T.
template <class T, class P, class Q>
__device__ void copy_as(const Tiling& t, const Pixels<P>& from, const Pixels<Q>& to, int count) {
  constexpr bool packed = kPacked<Q>;
  constexpr int kEach = sizeof(T) / sizeof(Q);
  const int run = count * t.patch * (packed ? 3 : 1) / kEach, lines = t.patch * (packed ? 1 : 3);
  for (int i = static_cast<int>(threadIdx.x); i < run * lines; i += kThreads) {
    const int line = i / run, k = i % run * kEach, channel = packed ? 0 : line / t.patch, y = packed ? line : line % t.patch;
    *reinterpret_cast<T*>(to.at + channel * to.channel + y * to.line + k) =
        *reinterpret_cast<const T*>(from.at + channel * from.channel + y * from.line + k);
  }
}

/// Copies the pixels of `count` patches between shared memory and `picture`, one of which is `from` and the other `to`; 16 bytes at a time
/// if all runs begin and end at multiples of 16.
template <class P, class Q, class R>
__device__ void copy_pixels(const Tiling& t, const Pixels<P>& from, const Pixels<Q>& to, const Pixels<R>& picture, int count) {
  const int64_t run = int64_t{count} * t.patch * picture.step, channel = kPacked<R> ? 0 : picture.channel;
  const auto bytes = static_cast<uintptr_t>((run | channel | picture.line) * static_cast<int64_t>(sizeof(R)));
  if ((bytes | reinterpret_cast<uintptr_t>(picture.at)) % 16 == 0) copy_as<uint4>(t, from, to, count);
  else copy_as<Q>(t, from, to, count);
}

/// A position in the patch vectors of a tile, and its pixel.
template <class P>
struct Cursor {
  int channel, y, x;
  P* pixel;

  /// Starts at value i, counted from the first patch.
  __device__ Cursor(const Pixels<P>& pixels, int p, int i) {
    const int patch = i / (3 * p * p), line = i % (3 * p * p) / p;
    channel = line / p, y = line % p, x = i % p;
    pixel = pixels.at + channel * pixels.channel + y * pixels.line + (patch * p + x) * pixels.step;
  }
  /// Moves to the next value of the same patch.
  __device__ void next(const Pixels<P>& pixels, int p) {
    ++x, pixel += pixels.step;
    if (x < p) return;
    x = 0, ++y, pixel += pixels.line - p * pixels.step;
    if (y < p) return;
    y = 0, ++channel, pixel += pixels.channel - p * pixels.line;
  }
};

/// value * scale + offset, with one of each per channel.
struct Affine {
  float scale[3], offset[3];
};

__device__ inline float pick(const float (&v)[3], int channel) { return channel == 0 ? v[0] : channel == 1 ? v[1] : v[2]; }

__device__ inline float from_pixel(uint8_t v, const Affine& f, int channel) {
  return fmaf(static_cast<float>(v), pick(f.scale, channel), pick(f.offset, channel));
}
__device__ inline float from_pixel(float v, const Affine&, int) { return v; }

__device__ inline void to_pixel(uint8_t* pixel, float v, const Affine& f, int channel) {
  const float byte = fminf(fmaxf(0.0f, fmaf(v, pick(f.scale, channel), pick(f.offset, channel))), 255.0f);
  *pixel = static_cast<uint8_t>(static_cast<int>(byte + 0.5f));
}
__device__ inline void to_pixel(float* pixel, float v, const Affine&, int) { *pixel = v; }

template <class P, class T, int V>
__global__ void __launch_bounds__(kThreads) unfold_kernel(const P* pictures, T* out, Tiling t, Affine f) {
  const int64_t row = blockIdx.x / t.tiles;
  const int first = static_cast<int>(blockIdx.x % t.tiles) * t.per_tile, count = min(t.per_tile, t.columns - first), p = t.patch, size = 3 * p * p;
  Pixels<const P> pixels = pixels_in_picture(t, pictures, row, first);
  if (t.shared) {
    const Pixels<P> tile = pixels_in_shared<P>(t);
    copy_pixels(t, pixels, tile, pixels, count);
    __syncthreads();
    pixels = {tile.at, tile.channel, tile.line, tile.step};
  }
  T* vectors = out + (row * t.columns + first) * size;
  for (int i = static_cast<int>(threadIdx.x) * V; i < count * size; i += kThreads * V) {
    Cursor<const P> at(pixels, p, i);
    float v[V];
#pragma unroll
    for (int k = 0; k < V; ++k) {
      v[k] = from_pixel(*at.pixel, f, at.channel);
      if (k + 1 < V) at.next(pixels, p);
    }
    store<V>(vectors + i, v);
  }
}

/// Patches [begin, end) of the batch, whose vectors begin at `in`.
template <class P, int V>
__global__ void __launch_bounds__(kThreads) fold_kernel(const float* in, P* pictures, int64_t begin, int64_t end, Tiling t, Affine f) {
  const int64_t row = begin / t.columns + blockIdx.x / t.tiles, left = row * t.columns + blockIdx.x % t.tiles * t.per_tile;
  const int64_t right = min(left + t.per_tile, (row + 1) * t.columns), first = max(left, begin);
  const int count = static_cast<int>(min(right, end) - first), p = t.patch, size = 3 * p * p;
  if (count <= 0) return;
  const Pixels<P> picture = pixels_in_picture(t, pictures, row, static_cast<int>(first - row * t.columns));
  const Pixels<P> tile = t.shared ? pixels_in_shared<P>(t) : picture;
  const float* vectors = in + (first - begin) * size;
  for (int i = static_cast<int>(threadIdx.x) * V; i < count * size; i += kThreads * V) {
    float v[V];
    load<V>(vectors + i, v);
    Cursor<P> at(tile, p, i);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      to_pixel(at.pixel, v[k], f, at.channel);
      if (k + 1 < V) at.next(tile, p);
    }
  }
  if (!t.shared) return;
  __syncthreads();
  copy_pixels(t, tile, picture, picture, count);
}

template <class P, class T>
void unfold_as(const UnfoldArgs& a, const Affine& f) {
  const Tiling t = tiling_of<P>(a.height, a.width, a.patch);
  const int64_t blocks = a.batch * (a.height / a.patch) * t.tiles, size = 3 * a.patch * a.patch;
  auto fits = [&](int64_t v) { return size % v == 0 && aligned({a.out}); };
  // the size of a 14 x 14 bfloat16 patch is not a multiple of 8 values
  const auto kernel = fits(kVector<T>) ? unfold_kernel<P, T, kVector<T>> : fits(4) ? unfold_kernel<P, T, 4> : unfold_kernel<P, T, 1>;
  launch(kernel, static_cast<unsigned>(blocks), kThreads, static_cast<size_t>(t.shared), static_cast<const P*>(a.pixels), static_cast<T*>(a.out), t, f);
}

template <class P>
void fold_as(const FoldArgs& a, const Affine& f) {
  const Tiling t = tiling_of<P>(a.height, a.width, a.patch);
  const int64_t rows = (a.first + a.rows - 1) / t.columns - a.first / t.columns + 1;
  const auto kernel = 3 * a.patch * a.patch % 4 == 0 && aligned({a.patches}) ? fold_kernel<P, 4> : fold_kernel<P, 1>;
  launch(kernel, static_cast<unsigned>(rows * t.tiles), kThreads, static_cast<size_t>(t.shared), a.patches, static_cast<P*>(a.pixels), a.first,
         a.first + a.rows, t, f);
}

// --- tokens -------------------------------------------------------------------------------------------------------

constexpr int kTokens = 8;  // per block: warps

template <class T, int V>
__global__ void __launch_bounds__(kWarp* kTokens) assemble_kernel(AssembleArgs a) {
  const int64_t tokens = a.prefix_count + a.patch_count, i = static_cast<int64_t>(blockIdx.x) * kTokens + threadIdx.y;
  if (i >= a.batch * tokens) return;
  const int64_t image = i / tokens, token = i % tokens - a.prefix_count;
  const float* prefix = token < 0 ? a.prefix + (token + a.prefix_count) * a.width : nullptr;
  const float* position = token >= 0 && a.position ? a.position + token * a.width : nullptr;
  const T* in = static_cast<const T*>(a.patches) + (image * a.patch_count + token) * a.width;
  T* out = static_cast<T*>(a.out) + i * a.width;
  const int width = static_cast<int>(a.width);
#pragma unroll 2
  for (int k = static_cast<int>(threadIdx.x) * V; k < width; k += kWarp * V) {
    float v[V], p[V] = {};
    if (prefix) load_values<V>(prefix + k, v);
    else load<V>(in + k, v);
    if (position) load_values<V>(position + k, p);
#pragma unroll
    for (int j = 0; j < V; ++j) v[j] += p[j];
    store<V>(out + k, v);
  }
}

template <class T>
void assemble_as(const AssembleArgs& a) {
  const int64_t rows = a.batch * (a.prefix_count + a.patch_count);
  const bool whole = a.width % kVector<T> == 0 && aligned({a.patches, a.out, a.prefix, a.position});
  launch(whole ? assemble_kernel<T, kVector<T>> : assemble_kernel<T, 1>, blocks_for(rows, kTokens), dim3(kWarp, kTokens), 0, a);
}

// --- position tables ------------------------------------------------------------------------------------------------

/// The taps of all positions of one dimension, on the device: those of position i are taps[begin[i]] to taps[begin[i + 1]].
struct Axis {
  Axis(int64_t in, int64_t out, bool antialias, bool transposed) {
    std::vector<std::vector<Tap>> lists(static_cast<size_t>(transposed ? in : out));
    for (int64_t i = 0; i < out; ++i)
      for (const Tap& tap : antialias ? antialiased_taps(i, in, out) : plain_taps(i, in, out)) {
        if (transposed) lists[static_cast<size_t>(tap.index)].push_back({static_cast<int32_t>(i), tap.weight});
        else lists[static_cast<size_t>(i)].push_back(tap);
      }
    std::vector<int32_t> ends = {0};
    std::vector<Tap> all;
    for (const auto& list : lists) {
      all.insert(all.end(), list.begin(), list.end());
      ends.push_back(static_cast<int32_t>(all.size()));
    }
    begin = to_device(ends.data(), static_cast<int64_t>(ends.size() * sizeof(int32_t)));
    taps = to_device(all.data(), static_cast<int64_t>(all.size() * sizeof(Tap)));
  }
  Tensor begin, taps;
};

/// out [*, out_cols, width] from in [*, in_cols, width]; a block computes one position.
__global__ void resize_kernel(const float* in, float* out, int in_cols, int out_cols, int64_t width, const int32_t* row_begin, const Tap* row_taps,
                              const int32_t* col_begin, const Tap* col_taps) {
  const int64_t position = blockIdx.x;
  const int row = static_cast<int>(position / out_cols), col = static_cast<int>(position % out_cols);
  for (int64_t k = threadIdx.x; k < width; k += blockDim.x) {
    float v = 0;
    for (int y = row_begin[row]; y < row_begin[row + 1]; ++y) {
      float line = 0;
      for (int x = col_begin[col]; x < col_begin[col + 1]; ++x)
        line = fmaf(col_taps[x].weight, in[(int64_t{row_taps[y].index} * in_cols + col_taps[x].index) * width + k], line);
      v = fmaf(row_taps[y].weight, line, v);
    }
    out[position * width + k] = v;
  }
}

void resize(const ResizeTableArgs& a, bool transposed) {
  const Axis rows(a.in_rows, a.out_rows, a.antialias, transposed), cols(a.in_cols, a.out_cols, a.antialias, transposed);
  const int64_t in_cols = transposed ? a.out_cols : a.in_cols, out_cols = transposed ? a.in_cols : a.out_cols;
  launch(resize_kernel, static_cast<unsigned>((transposed ? a.in_rows : a.out_rows) * out_cols), kThreads, 0, a.in, a.out, static_cast<int>(in_cols),
         static_cast<int>(out_cols), a.width, rows.begin.data<int32_t>(), rows.taps.data<Tap>(), cols.begin.data<int32_t>(), cols.taps.data<Tap>());
}

}  // namespace

void unfold(const UnfoldArgs& a) {
  Affine f;
  for (int c = 0; c < 3; ++c) f.scale[c] = 1.0f / (255.0f * a.std[c]), f.offset[c] = -a.mean[c] / a.std[c];
  const bool half = a.dtype == DType::BFloat16;
  if (a.pixel_dtype == DType::UInt8) return half ? unfold_as<uint8_t, bf16>(a, f) : unfold_as<uint8_t, float>(a, f);
  half ? unfold_as<float, bf16>(a, f) : unfold_as<float, float>(a, f);
}

void fold(const FoldArgs& a) {
  if (a.rows == 0) return;
  Affine f;
  for (int c = 0; c < 3; ++c) f.scale[c] = 255.0f * a.std[c], f.offset[c] = 255.0f * a.mean[c];
  if (a.pixel_dtype == DType::UInt8) fold_as<uint8_t>(a, f);
  else fold_as<float>(a, f);
}

void assemble(const AssembleArgs& a) {
  dispatch_float(a.dtype, [&]<class T> { assemble_as<T>(a); });
}

void resize_table(const ResizeTableArgs& a) { resize(a, false); }

void resize_table_backward(const ResizeTableArgs& a) { resize(a, true); }

}  // namespace uniflow::cuda
