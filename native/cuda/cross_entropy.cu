/// Cross-entropy with one label per row: loss, gradient and hits.
///
/// A warp has a row and keeps its packs in registers through the sweeps for the maximum, the sum and the gradient, so memory is read once.
/// Rows longer than 16 packs per lane, and rows that are not 16-byte aligned, are read again in each sweep. Blocks write the totals of
/// their rows; one block adds these up, in double and in a fixed order. Roofline bound: logits read, gradient written.
#include <cmath>

#include "native/cuda/kernels.h"
#include "native/cuda/vectors.cuh"

namespace uniflow::cuda {
namespace {

constexpr int kRows = 4;  // per block, one warp each
constexpr int kThreads = kRows * kWarp;
constexpr int kFinishThreads = 1024;

/// Totals of the rows of a block, or of all rows.
struct Totals {
  double loss;
  int64_t hits, wrong_labels;
};

/// A lane's part of a row: packs lane, lane + 32, ... of N values. At most Held of them are in registers; with Held 0, any number is read
/// in each sweep.
template <class T, int N, int Held>
class Share {
 public:
  using P = Pack<T, N>;

  __device__ Share(const T* row, int64_t width) : row_(reinterpret_cast<const P*>(row)), packs_(width / N) {
    if constexpr (Held > 0) {
#pragma unroll
      for (int k = 0; k < Held; ++k) held_[k] = lane_ + k * kWarp < packs_ ? row_[lane_ + k * kWarp] : P{};
    }
  }

  /// body(pack index, its values)
  template <class Body>
  __device__ void each(Body&& body) const {
    if constexpr (Held > 0) {
#pragma unroll
      for (int k = 0; k < Held; ++k)
        if (lane_ + k * kWarp < packs_) body(int64_t{lane_ + k * kWarp}, held_[k]);
    } else {
#pragma unroll 4
      for (int64_t i = lane_; i < packs_; i += kWarp) body(i, row_[i]);
    }
  }

 private:
  const P* row_;
  const int64_t packs_;
  const int lane_ = static_cast<int>(threadIdx.x) % kWarp;
  P held_[Held > 0 ? Held : 1];
};

struct Row {
  double loss;
  bool hit;
};

/// Returns -log softmax(x)[label] and whether the label is the first maximum; grad = scale * (softmax(x) - onehot(label)).
template <class T, int N, int Held>
__device__ inline Row row_of(const T* x, T* grad, int64_t classes, int64_t label, float scale) {
  using P = Pack<T, N>;
  const Share<T, N, Held> share(x, classes);
  const float at_label = to_f32(x[label]);
  float top = -INFINITY;  // the maximum drops a NaN, which still reaches the sum
  share.each([&](int64_t, const P& p) {
#pragma unroll
    for (int i = 0; i < N; ++i) top = fmaxf(top, to_f32(p.v[i]));
  });
  top = warp_max(top);
  float total = 0;
  bool earlier = false;  // an equal value before the label
  share.each([&](int64_t at, const P& p) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float v = to_f32(p.v[i]);
      total += expf(v - top);
      earlier = earlier || (v == top && at * N + i < label);
    }
  });
  total = warp_sum(total);
  const float factor = scale / total;
  share.each([&](int64_t at, const P& p) {
    P out;
#pragma unroll
    for (int i = 0; i < N; ++i) out.v[i] = from_f32<T>(factor * expf(to_f32(p.v[i]) - top) - (at * N + i == label ? scale : 0.0f));
    reinterpret_cast<P*>(grad)[at] = out;
  });
  const bool hit = !__any_sync(kAllLanes, earlier) && at_label == top;
  return {log(static_cast<double>(total)) - static_cast<double>(at_label - top), hit};
}

template <class T, int N, int Held>
__global__ void __launch_bounds__(kThreads)
    score(const T* logits, const int32_t* labels, T* grad, int64_t rows, int64_t classes, float scale, Totals* partial) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t r = int64_t{blockIdx.x} * kRows + warp;
  Row row = {0, false};
  bool wrong = false;
  if (r < rows) {
    const int64_t label = labels[r];
    wrong = label < 0 || label >= classes;
    if (!wrong) row = row_of<T, N, Held>(logits + r * classes, grad + r * classes, classes, label, scale);
  }
  const double loss = block_sum(lane == 0 ? row.loss : 0.0);
  const int hits = __syncthreads_count(lane == 0 && row.hit), wrong_labels = __syncthreads_count(lane == 0 && wrong);
  if (threadIdx.x == 0) partial[blockIdx.x] = {loss, hits, wrong_labels};
}

/// Runs as a single block.
__global__ void __launch_bounds__(kFinishThreads)
    finish(const Totals* partial, int64_t blocks, int64_t rows, float* loss, float* correct, int64_t* wrong_labels) {
  Totals t = {};
  for (int64_t i = threadIdx.x; i < blocks; i += kFinishThreads) {
    t.loss += partial[i].loss;
    t.hits += partial[i].hits;
    t.wrong_labels += partial[i].wrong_labels;
  }
  t = {block_sum(t.loss), block_sum(t.hits), block_sum(t.wrong_labels)};
  if (threadIdx.x != 0) return;
  *loss = static_cast<float>(t.loss / static_cast<double>(rows));
  *correct = static_cast<float>(t.hits);
  *wrong_labels = t.wrong_labels;
}

template <class T>
using Score = void (*)(const T*, const int32_t*, T*, int64_t, int64_t, float, Totals*);

/// The kernel with the smallest sufficient number of packs per lane among `Held`.
template <class T, int... Held>
Score<T> smallest(int64_t packs) {
  Score<T> kernel = score<T, kVector<T>, 0>;
  (void)((packs <= Held && (kernel = score<T, kVector<T>, Held>, true)) || ...);
  return kernel;
}

template <class T>
void all_rows(const CrossEntropyArgs& a, unsigned blocks, Totals* partial) {
  const bool vectors = a.classes % kVector<T> == 0 && aligned({a.logits, a.grad});
  const Score<T> kernel = vectors ? smallest<T, 1, 2, 4, 8, 16>((a.classes / kVector<T> + kWarp - 1) / kWarp) : score<T, 1, 0>;
  launch(kernel, blocks, kThreads, 0, as<T>(a.logits), a.labels, as<T>(a.grad), a.rows, a.classes, 1.0f / static_cast<float>(a.rows),
         partial);
}

}  // namespace

int64_t cross_entropy(const CrossEntropyArgs& a) {
  const unsigned blocks = blocks_for(a.rows, kRows);
  const Tensor partial = scratch(DType::UInt8, {blocks * static_cast<int64_t>(sizeof(Totals))});
  const Tensor counted = scratch(DType::UInt8, {sizeof(int64_t)});
  dispatch_float(a.dtype, [&]<class T> { all_rows<T>(a, blocks, partial.data<Totals>()); });
  launch(finish, 1, kFinishThreads, 0, partial.data<Totals>(), blocks, a.rows, a.loss, a.correct, counted.data<int64_t>());
  int64_t wrong_labels = 0;
  to_host(&wrong_labels, counted.data(), sizeof wrong_labels);
  return wrong_labels;
}

}  // namespace uniflow::cuda
