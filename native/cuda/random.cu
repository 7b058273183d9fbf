/// Noise for the flow and random times, keyed by (seed, image, patch); the words are those of native/core/philox.h.
///
/// noise: a warp computes a row; each lane computes one Philox block (four numbers, 16 bytes) at a time. Roofline bound: the bytes written,
/// although the roughly 100 integer instructions of a block and its logarithms, sines and cosines take about as long. draw: a thread
/// computes a number.
#include "native/core/philox.h"
#include "native/cuda/kernels.h"
#include "native/cuda/vectors.cuh"

namespace uniflow::cuda {
namespace {

constexpr int kRows = 8;  // per block: warps

/// V numbers of a Philox block are written at once.
template <int V>
__global__ void __launch_bounds__(kWarp* kRows) noise_kernel(float* out, int64_t first, int64_t rows, int64_t width, int64_t patches, uint64_t seed,
                                                             const uint32_t* ids) {
  const int64_t r = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.y, at = first + r;
  if (r >= rows) return;
  const uint32_t patch = static_cast<uint32_t>(at % patches), image = ids[at / patches - first / patches];
  for (int64_t i = 4 * static_cast<int64_t>(threadIdx.x); i < width; i += 4 * kWarp) {
    const auto four = philox_normal(philox({static_cast<uint32_t>(i / 4), patch, image, 0}, seed));
    float v[4] = {four[0], four[1], four[2], four[3]};
    if constexpr (V == 4) {
      store<4>(out + r * width + i, v);
    } else {
      for (int k = 0; k < 4 && i + k < width; ++k) out[r * width + i + k] = v[k];
    }
  }
}

__global__ void draw_kernel(DrawArgs a, const uint32_t* ids) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= a.images * a.patches) return;
  const PhiloxBlock block = philox({0, static_cast<uint32_t>(i % a.patches), ids[i / a.patches], 2}, a.seed);
  if (philox_uniform(block[2]) <= a.zero) a.out[i] = 0;
  else a.out[i] = a.logit_normal ? 1.0f / (1.0f + expf(-(a.mean + a.std * philox_normal(block)[0]))) : philox_uniform(block[0]);
}

Tensor ids_to_device(const uint32_t* ids, int64_t count) { return to_device(ids, count * static_cast<int64_t>(sizeof(uint32_t))); }

}  // namespace

void noise(const NoiseArgs& a) {
  if (a.rows == 0) return;
  const int64_t image = a.first / a.patches, last = (a.first + a.rows - 1) / a.patches;
  const Tensor ids = ids_to_device(a.ids + image, last - image + 1);
  const bool whole = a.width % 4 == 0 && aligned({a.out});
  launch(whole ? noise_kernel<4> : noise_kernel<1>, blocks_for(a.rows, kRows), dim3(kWarp, kRows), 0, a.out, a.first, a.rows, a.width, a.patches, a.seed,
         ids.data<uint32_t>());
}

void draw(const DrawArgs& a) {
  if (a.images * a.patches == 0) return;
  const Tensor ids = ids_to_device(a.ids, a.images);
  launch(draw_kernel, blocks_for(a.images * a.patches, 256), 256, 0, a, ids.data<uint32_t>());
}

}  // namespace uniflow::cuda
