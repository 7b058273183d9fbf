/// Multi-head self-attention, softmax(q k^T * scale) v, with an online softmax: only the scores of a few
/// query rows against one block of keys ever exist. Any S >= 1, 1 <= E <= kMaxHeadDim, scale > 0.
///
/// Algorithm. A head, one per (image, head), has its keys and values packed once, by blocks of keys.
/// Then, for each query block, for each key block, for each group of kRows query rows,
///   scores = q k^T; weights = 2^(scores * scale * log2 e - running maximum); sum += weights;
///   out = out * 2^(old maximum - new maximum) + weights v; and at the end out / sum.
/// Each thread takes whole heads, whose packed form stays in its cache, as long as there is one for
/// every thread; the heads left over are split among all threads by key block and query block. How a row
/// is computed depends on nothing but S and E: not on the batch, the rows in its group, or the thread.
///
/// Units. Both products run on 32-bit units: a float32, or with AVX512-BF16 a pair of bfloat16, which one
/// vdpbf16ps multiplies and adds in float32. Other machines widen bfloat16 to float32 while packing.
///
/// Packed panels. A matrix of `steps` units x n vectors of columns is cut into panels of at most kPanel
/// vectors, as even as possible, each stored as [steps][vectors * kWidth] units:
///   keys of a block, k^T: steps along the head width, columns = keys;
///   values of a block, v: steps along the keys, columns = head width.
/// Missing keys and columns are zero. A block is [keys | values] in one piece.
///
/// Floors, relative L2: 2e-6 in float32; 6e-3 in bfloat16, whose weights are rounded before they meet v.
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <iterator>
#include <vector>

#include "native/core/parallel.h"
#include "native/cpu/kernels.h"
#include "native/cpu/simd.h"

namespace uniflow::cpu::UNIFLOW_ISA {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kPanel = 4;  // vectors: kRows / 2 rows of them are accumulators for 32 registers
#else
constexpr int kPanel = 2;  // the same for 16 registers
#endif
constexpr int kRows = 12;               // query rows that go through the softmax together
constexpr int64_t kKeyBlock = 256;      // keys per block, about; see Plan
constexpr int64_t kMaxKeyBlock = kKeyBlock / 2 * 3, kMaxQueryBlock = 192, kMaxHeadDim = 512;
constexpr int64_t kQueryFloats = 6144;  // outputs of a query block: half of a first-level cache
static_assert(kQueryFloats >= kRows * kMaxHeadDim);
constexpr int64_t kAhead = 24;          // keys from the one being packed to the one being prefetched
constexpr float kMasked = -1e30f;       // score of a missing key, start of the running maximum
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

/// 2^t for t <= 0 (or just above), by a minimax polynomial on [-1/2, 1/2]; NaN stays NaN.
template <class Units>
static inline vf exp2(vf t) {
#if !defined(__AVX512F__)
  t = max(splat(-125.0f), t);
#endif
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const vf shifted = t + magic;
  const vf n = shifted - magic;
  vf p = splat(Units::kExp2[0]);
  for (size_t i = 1; i < std::size(Units::kExp2); ++i) p = p * (t - n) + Units::kExp2[i];
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);  // GCC 12 warns of the unmasked one
#else
  return p * (vf)(((vu)shifted << 23) + 0x3f800000u);
#endif
}

/// One float32 per unit; T is what the tensors hold.
template <class T>
struct FloatUnits {
  using Element = T;
  static constexpr int kPerUnit = 1;
  static constexpr float kExp2[] = {1.534581243e-4f, 1.33999309e-3f,  9.618489072e-3f, 5.550328642e-2f,
                                    2.402264625e-1f, 6.931471825e-1f, 1.0f};  // relative error 2e-8

  static inline vf multiply_add(vf sum, vu a, vu b) { return sum + (vf)a * (vf)b; }

  /// One row of head_dim elements as units.
  static inline void load_row(const T* row, int64_t head_dim, uint32_t* units) {
    float* const out = reinterpret_cast<float*>(units);
    for_lanes(head_dim, [&](int64_t i, int lanes) { store_lanes(out + i, load_lanes(row + i, lanes), lanes); });
  }

  /// Values of two keys (`odd` may be null), or of one if a unit holds one, as units.
  static inline vu interleave(const T* even, const T*, int lanes) { return (vu)load_lanes(even, lanes); }

  /// Two vectors of weights, stored over the scores that they came from; returns sum + weights.
  static inline vf store_weights(float* weights, int64_t i, vf a, vf b, vf sum) {
    store(weights + i, a);
    store(weights + i + kWidth, b);
    return sum + (a + b);
  }
};

#if defined(__AVX512BF16__)
/// A pair of bfloat16 per unit, the first in the low half.
struct PairUnits {
  using Element = bf16;
  static constexpr int kPerUnit = 2;
  /// Relative error 8e-5, well under the 2e-3 that rounding the weight to bfloat16 costs.
  static constexpr float kExp2[] = {5.517166853e-2f, 2.426111251e-1f, 6.932609677e-1f, 9.999280572e-1f};

  static inline vf multiply_add(vf sum, vu a, vu b) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }

  static inline void load_row(const bf16* row, int64_t head_dim, uint32_t* units) {
    int64_t i = 0;
    for (; i + 2 * kWidth <= head_dim; i += 2 * kWidth) std::memcpy(units + i / 2, row + i, sizeof(vu));
    if (i == head_dim) return;
    units[(head_dim - 1) / 2] = 0;  // whose high half an odd width leaves out
    std::memcpy(units + i / 2, row + i, static_cast<size_t>(head_dim - i) * sizeof(bf16));
  }

  static inline vu interleave(const bf16* even, const bf16* odd, int lanes) {
    return ((vu)load_lanes(even, lanes) >> 16) | (odd ? (vu)load_lanes(odd, lanes) : vu{});
  }

  /// The sum is of the rounded weights, the ones that multiply v, so that they weigh exactly 1 in all.
  static inline vf store_weights(float* weights, int64_t i, vf a, vf b, vf sum) {
    const vu pairs = (vu)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
    std::memcpy(reinterpret_cast<bf16*>(weights) + i, &pairs, sizeof pairs);
    return multiply_add(sum, pairs, vu{} + 0x3f803f80u);  // times (1, 1)
  }
};
#endif

/// Sizes of a call, in elements, units or vectors as the names say.
template <class Units>
struct Plan {
  explicit Plan(const AttentionArgs& a)
      : seq(a.seq), head_dim(a.head_dim), heads(a.heads), row_stride(3 * a.heads * a.head_dim),
        head_steps(ceil_div(a.head_dim, Units::kPerUnit)), head_vectors(ceil_div(a.head_dim, kWidth)),
        scale(a.scale * 1.44269504088896341f) {
    // As even as possible: a last block of a few keys would cost as much overhead as a full one.
    key_blocks = std::max<int64_t>(1, (seq + kKeyBlock / 2) / kKeyBlock);
    key_block = round_up(ceil_div(seq, key_blocks), 2 * kWidth);
    key_blocks = ceil_div(seq, key_block);
    key_units = head_steps * key_block;  // where the values of a block start
    block_units = key_units + key_block / Units::kPerUnit * head_vectors * kWidth;
    const int64_t most = std::min(kMaxQueryBlock, kQueryFloats / (head_vectors * kWidth));
    query_blocks = ceil_div(seq, most / kRows * kRows);
    query_block = round_up(ceil_div(seq, query_blocks), kRows);
    query_blocks = ceil_div(seq, query_block);
  }

  int64_t keys_in(int64_t block) const { return std::min(key_block, seq - block * key_block); }
  int64_t seq, head_dim, heads, row_stride, head_steps, head_vectors;
  float scale;  // of exponents of 2
  int64_t key_blocks, key_block, key_units, block_units, query_blocks, query_block;
};

/// Calls body(first vector, vectors) for the panels of a matrix of n vectors.
template <class Body>
static inline void for_panels(int64_t n, Body&& body) {
  const int64_t panels = ceil_div(n, kPanel);
  int64_t first = 0;
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t end = (p + 1) * n / panels;
    body(first, end - first);
    first = end;
  }
}

/// Rows lie a token's whole q | k | v apart, where the hardware does not see the next one coming.
template <class T>
static inline void prefetch_row(const T* row, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + i);
}

/// Packs `count` keys, the rows of `k`, as panels of k^T.
template <class Units>
static void pack_keys(const Plan<Units>& plan, const typename Units::Element* k, int64_t count, uint32_t* out) {
  alignas(64) uint32_t rows[kWidth * kMaxHeadDim];
  const int64_t steps = plan.head_steps, tile = round_up(steps, 4);
  for_panels(ceil_div(count, kWidth), [&](int64_t first, int64_t vectors) {
    const int64_t columns = vectors * kWidth;
    for (int64_t v = 0; v < vectors; ++v) {
      for (int64_t i = 0; i < kWidth; ++i) {
        const int64_t key = (first + v) * kWidth + i;
        if (key + kAhead < count) prefetch_row(k + (key + kAhead) * plan.row_stride, plan.head_dim);
        if (key < count) Units::load_row(k + key * plan.row_stride, plan.head_dim, rows + i * tile);
        else std::fill_n(rows + i * tile, steps, 0u);
      }
      uint32_t* column = out + first * kWidth * steps + v * kWidth;
      int64_t s = 0;
      for (; s + 4 <= steps; s += 4)
        for (int64_t i = 0; i < kWidth; i += 4)
          transpose_4x4(rows + i * tile + s, tile, column + s * columns + i, columns);
      for (; s < steps; ++s)
        for (int64_t i = 0; i < kWidth; ++i) column[s * columns + i] = rows[i * tile + s];
    }
  });
}

/// Packs the rows of `v` that belong to `count` keys, as panels.
template <class Units>
static void pack_values(const Plan<Units>& plan, const typename Units::Element* v, int64_t count,
                        uint32_t* out) {
  const int64_t steps = ceil_div(count, Units::kPerUnit);
  for_panels(plan.head_vectors, [&](int64_t first, int64_t vectors) {
    uint32_t* to = out + first * kWidth * steps;
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t key = s * Units::kPerUnit;  // and the next one, if a unit holds two
      const auto* even = v + key * plan.row_stride;
      const auto* odd = key + 1 < count ? even + plan.row_stride : nullptr;
      for (int64_t i = key + kAhead; i < std::min(key + kAhead + Units::kPerUnit, count); ++i)
        prefetch_row(v + i * plan.row_stride, plan.head_dim);
      for (int64_t i = first * kWidth; i < (first + vectors) * kWidth; i += kWidth, to += kWidth) {
        const int lanes = static_cast<int>(std::min<int64_t>(kWidth, plan.head_dim - i));
        store(to, Units::interleave(even + i, odd ? odd + i : nullptr, lanes));
      }
    }
  });
}

/// out[Rows][Vectors] = a[Rows][steps] panel[steps][Vectors], plus out * rescale if Accumulate (known
/// when compiling, or GCC keeps the sums in memory).
template <class Units, bool Accumulate, int Rows, int Vectors>
static inline void multiply_tile(const uint32_t* a, int64_t a_stride, const uint32_t* panel, int64_t steps,
                                 float* out, int64_t out_stride, const float* rescale) {
  vf sum[Rows][Vectors] = {};
  for (int r = 0; Accumulate && r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) sum[r][v] = load(out + r * out_stride + v * kWidth) * rescale[r];
  for (int64_t s = 0; s < steps; ++s) {
    vu b[Vectors];
    for (int v = 0; v < Vectors; ++v) b[v] = load(panel + (s * Vectors + v) * kWidth);
    for (int r = 0; r < Rows; ++r) {
      uint32_t unit;
      std::memcpy(&unit, a + r * a_stride + s, sizeof unit);  // may point into floats
      const vu x = vu{} + unit;
      for (int v = 0; v < Vectors; ++v) sum[r][v] = Units::multiply_add(sum[r][v], x, b[v]);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) store(out + r * out_stride + v * kWidth, sum[r][v]);
}

/// multiply_tile over the panels of n vectors of columns, for a group of kRows rows, the first `rows` in use.
template <class Units, bool Accumulate>
static void multiply(const uint32_t* a, int64_t a_stride, int64_t rows, const uint32_t* packed, int64_t steps,
                     int64_t n, float* out, int64_t out_stride, const float* rescale) {
  for_panels(n, [&](int64_t first, int64_t vectors) {
    const auto panel = [&]<int Vectors>() {  // narrow panels take more rows, to have enough sums in flight
      constexpr int kTileRows = 2 * Vectors <= kPanel ? kRows : kRows / 2;
      for (int64_t r = 0; r < rows; r += kTileRows)
        multiply_tile<Units, Accumulate, kTileRows, Vectors>(
            a + r * a_stride, a_stride, packed + first * kWidth * steps, steps,
            out + r * out_stride + first * kWidth, out_stride, rescale + r);
    };
    if (vectors == 1) panel.template operator()<1>();
    if (vectors == 2) panel.template operator()<2>();
    if constexpr (kPanel == 4) {
      if (vectors == 3) panel.template operator()<3>();
      if (vectors == 4) panel.template operator()<4>();
    }
  });
}

/// The largest of a row of `padded` scores, a multiple of 2 * kWidth.
static inline float row_maximum(const float* row, int64_t padded) {
  vf a = load(row), b = load(row + kWidth);
  for (int64_t i = 2 * kWidth; i < padded; i += 2 * kWidth) {
    a = max(a, load(row + i));
    b = max(b, load(row + i + kWidth));
  }
  return max(max(a, b));
}

/// Turns `rows` rows of scores of `keys` keys into weights, in place; rescale: what the rows' old sums
/// and accumulators must be multiplied by.
template <class Units>
static void softmax(float* scores, int64_t stride, int64_t rows, int64_t keys, float scale, float* maximum,
                    float* sum, float* rescale) {
  const int64_t padded = round_up(keys, 2 * kWidth);
  for (int64_t r = 0; r < rows; ++r) {  // all maxima first, so that the rows' chains of dependencies overlap
    float* row = scores + r * stride;
    const float old = maximum[r];
    std::fill(row + keys, row + padded, kMasked);
    maximum[r] = std::max(old, row_maximum(row, padded) * scale);  // a NaN passes to the weights instead
    rescale[r] = exp2<Units>(splat(old - maximum[r]))[0];
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* row = scores + r * stride;
    const vf shift = splat(maximum[r]);
    vf total = load(sum + r * kWidth) * rescale[r];
    for (int64_t i = 0; i < padded; i += 2 * kWidth)
      total = Units::store_weights(row, i, exp2<Units>(load(row + i) * scale - shift),
                                   exp2<Units>(load(row + i + kWidth) * scale - shift), total);
    store(sum + r * kWidth, total);
  }
}

/// One query block of one head: rows [0, rows) of q, all of the head's packed blocks.
template <class Units>
static void attend(const Plan<Units>& plan, const typename Units::Element* q, int64_t rows,
                   const uint32_t* packed, typename Units::Element* out, int64_t out_stride) {
  const int64_t steps = plan.head_steps, columns = plan.head_vectors * kWidth;
  alignas(64) uint32_t query[kQueryFloats];
  alignas(64) float values[kQueryFloats];
  alignas(64) float scores[kRows * kMaxKeyBlock];
  alignas(64) float sums[kMaxQueryBlock * kWidth];  // of weights so far, one partial sum per lane
  float maxima[kMaxQueryBlock];                     // of scores so far, times plan.scale
  const int64_t padded = round_up(rows, kRows);
  std::fill_n(query + rows * steps, (padded - rows) * steps, 0u);
  std::fill_n(values, padded * columns, 0.0f);
  std::fill_n(maxima, rows, kMasked);
  std::fill_n(sums, rows * kWidth, 0.0f);
  for (int64_t r = 0; r < rows; ++r) Units::load_row(q + r * plan.row_stride, plan.head_dim, query + r * steps);

  for (int64_t block = 0; block < plan.key_blocks; ++block, packed += plan.block_units) {
    const int64_t keys = plan.keys_in(block);
    for (int64_t first = 0; first < rows; first += kRows) {
      const int64_t count = std::min<int64_t>(kRows, rows - first);
      float rescale[kRows] = {};
      multiply<Units, false>(query + first * steps, steps, count, packed, steps, ceil_div(keys, kWidth), scores,
                             plan.key_block, rescale);
      softmax<Units>(scores, plan.key_block, count, keys, plan.scale, maxima + first, sums + first * kWidth,
                     rescale);
      multiply<Units, true>(reinterpret_cast<const uint32_t*>(scores), plan.key_block, count,
                            packed + plan.key_units, ceil_div(keys, Units::kPerUnit), plan.head_vectors,
                            values + first * columns, columns, rescale);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const float inverse = 1.0f / sum(load(sums + r * kWidth));
    for_lanes(plan.head_dim, [&](int64_t i, int lanes) {
      store_lanes(out + r * out_stride + i, load(values + r * columns + i) * inverse, lanes);
    });
  }
}

/// Memory for packed heads, kept by the calling thread from call to call.
static uint32_t* scratch(int64_t units) {
  struct alignas(64) Line { uint32_t units[16]; };
  static thread_local std::vector<Line> memory;
  if (const auto lines = static_cast<size_t>(ceil_div(units, 16)); memory.size() < lines) memory.resize(lines);
  return memory.data()->units;
}

template <class Units>
static void attention_of(const AttentionArgs& args) {
  using Element = typename Units::Element;
  const Plan<Units> plan(args);
  const int64_t width = plan.heads * plan.head_dim, heads = args.batch * plan.heads;
  const int64_t threads = omp_get_max_threads(), whole = heads / threads * threads, rest = heads - whole;
  const int64_t head_units = plan.key_blocks * plan.block_units;
  uint32_t* const packed = scratch(std::min(heads, threads) * head_units);

  const auto q_of = [&](int64_t head) {
    return static_cast<const Element*>(args.qkv) + head / plan.heads * plan.seq * plan.row_stride +
           head % plan.heads * plan.head_dim;
  };
  const auto pack_block = [&](int64_t head, int64_t block, uint32_t* to) {
    const Element* k = q_of(head) + width + block * plan.key_block * plan.row_stride;
    to += block * plan.block_units;
    pack_keys<Units>(plan, k, plan.keys_in(block), to);
    pack_values<Units>(plan, k + width, plan.keys_in(block), to + plan.key_units);
  };
  const auto attend_block = [&](int64_t head, int64_t block, const uint32_t* from) {
    const int64_t start = block * plan.query_block;
    Element* out = static_cast<Element*>(args.out) + (head / plan.heads * plan.seq + start) * width +
                   head % plan.heads * plan.head_dim;
    attend<Units>(plan, q_of(head) + start * plan.row_stride, std::min(plan.query_block, plan.seq - start),
                  from, out, width);
  };

  std::atomic<int64_t> next{0};
  parallel_for(whole == 0 ? 0 : threads, [&](int64_t slot) {
    uint32_t* const mine = packed + slot * head_units;
    for (int64_t head; (head = next.fetch_add(1, std::memory_order_relaxed)) < whole;) {
      for (int64_t block = 0; block < plan.key_blocks; ++block) pack_block(head, block, mine);
      for (int64_t block = 0; block < plan.query_blocks; ++block) attend_block(head, block, mine);
    }
  });
  parallel_for(rest * plan.key_blocks, [&](int64_t i) {
    const int64_t n = i / plan.key_blocks;
    pack_block(whole + n, i % plan.key_blocks, packed + n * head_units);
  });
  parallel_for(rest * plan.query_blocks, [&](int64_t i) {
    const int64_t n = i / plan.query_blocks;
    attend_block(whole + n, i % plan.query_blocks, packed + n * head_units);
  }, /*dynamic=*/true);
}

}  // namespace

void attention(const AttentionArgs& args) {
  if (args.dtype == DType::Float32) return attention_of<FloatUnits<float>>(args);
#if defined(__AVX512BF16__)
  attention_of<PairUnits>(args);
#else
  attention_of<FloatUnits<bf16>>(args);
#endif
}

}  // namespace uniflow::cpu::UNIFLOW_ISA
