/// Multi-head self-attention, softmax(q k^T * scale) v, with an online softmax: only the scores of a few query rows against one block of
/// keys exist at a time. Any S >= 1, 1 <= E <= kMaxHeadDim, scale > 0.
///
/// Algorithm. A head is one per (image, head). Its keys and values are packed once, by blocks of keys. Then, for each query block, for each
/// key block, for each group of kRows query rows,
///   scores = q k^T; weights = 2^(scores * scale * log2 e - running maximum); sum += weights;
///   out = out * 2^(old maximum - new maximum) + weights v; and at the end out / sum.
/// Threads take whole heads, whose packed form stays in the thread's cache, while there is a head for every thread. The remaining heads are
/// split among all threads by key block and query block. The result of a row depends only on S and E, not on the batch, the other rows of
/// its group, or the thread.
///
/// A packed block of keys (attention_tile.h) is [keys, transposed | values, untransposed] in one piece.
///
/// Tolerances, relative L2: 2e-6 in float32; 6e-3 in bfloat16, whose weights are rounded before the product with v.
#include <algorithm>
#include <atomic>
#include <cmath>

#include "native/core/parallel.h"
#include "native/cpu/attention_tile.h"
#include "native/cpu/kernels.h"

namespace uniflow::cpu::UNIFLOW_ISA {
namespace {

constexpr int64_t kKeyBlock = 256;      // approximate keys per block; see Plan
constexpr int64_t kMaxKeyBlock = kKeyBlock / 2 * 3, kMaxQueryBlock = 192;
constexpr int64_t kQueryFloats = 6144;  // outputs of a query block: half of a first-level cache
static_assert(kQueryFloats >= kRows * kMaxHeadDim);
constexpr float kMasked = -1e30f;       // score of a missing key, start of the running maximum

/// Sizes of a call, in elements, units or vectors as the names say.
template <class Units>
struct Plan {
  explicit Plan(const AttentionArgs& a)
      : seq(a.seq), head_dim(a.head_dim), heads(a.heads), row_stride(3 * a.heads * a.head_dim),
        head_steps(ceil_div(a.head_dim, Units::kPerUnit)), head_vectors(ceil_div(a.head_dim, kWidth)),
        scale(a.scale * static_cast<float>(kLog2E)) {
    // Equal blocks: a last block of a few keys would cost as much overhead as a full one.
    key_blocks = std::max<int64_t>(1, (seq + kKeyBlock / 2) / kKeyBlock);
    key_block = round_up(ceil_div(seq, key_blocks), 2 * kWidth);
    key_blocks = ceil_div(seq, key_block);
    key_units = head_steps * key_block;  // offset of a block's values
    block_units = key_units + key_block / Units::kPerUnit * head_vectors * kWidth;
    const int64_t most = std::min(kMaxQueryBlock, kQueryFloats / (head_vectors * kWidth));
    query_blocks = ceil_div(seq, most / kRows * kRows);
    query_block = round_up(ceil_div(seq, query_blocks), kRows);
    query_blocks = ceil_div(seq, query_block);
  }

  int64_t keys_in(int64_t block) const { return std::min(key_block, seq - block * key_block); }
  int64_t seq, head_dim, heads, row_stride, head_steps, head_vectors;
  float scale;  // scale of the exponents of 2
  int64_t key_blocks, key_block, key_units, block_units, query_blocks, query_block;
};

/// Maximum of a row of `padded` scores, a multiple of 2 * kWidth.
static inline float row_maximum(const float* row, int64_t padded) {
  vf a = load(row), b = load(row + kWidth);
  for (int64_t i = 2 * kWidth; i < padded; i += 2 * kWidth) {
    a = max(a, load(row + i));
    b = max(b, load(row + i + kWidth));
  }
  return max(max(a, b));
}

/// Turns `rows` rows of scores of `keys` keys into weights, in place. rescale: the factors for the rows' previous sums and accumulators.
template <class Units>
static void softmax(float* scores, int64_t stride, int64_t rows, int64_t keys, float scale, float* maximum,
                    float* sum, float* rescale) {
  const int64_t padded = round_up(keys, 2 * kWidth);
  for (int64_t r = 0; r < rows; ++r) {  // all maxima first, so the rows' dependency chains overlap
    float* row = scores + r * stride;
    const float old = maximum[r];
    std::fill(row + keys, row + padded, kMasked);
    maximum[r] = std::max(old, row_maximum(row, padded) * scale);  // std::max drops a NaN, which still reaches the weights
    rescale[r] = exp2<Units>(splat(old - maximum[r]))[0];
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* row = scores + r * stride;
    const vf shift = splat(maximum[r]);
    vf total = load(sum + r * kWidth) * rescale[r];
    for (int64_t i = 0; i < padded; i += 2 * kWidth)
      total = Units::store_and_sum(row, i, exp2<Units>(load(row + i) * scale - shift),
                                   exp2<Units>(load(row + i + kWidth) * scale - shift), total);
    store(sum + r * kWidth, total);
  }
}

/// Processes one query block `q` of a head against all of the head's packed blocks. log_sum_exp, one per query, may be null.
template <class Units>
static void attend(const Plan<Units>& plan, const Rows<typename Units::Element>& q, const uint32_t* packed,
                   typename Units::Element* out, int64_t out_stride, float* log_sum_exp) {
  const int64_t steps = plan.head_steps, columns = plan.head_vectors * kWidth;
  alignas(64) uint32_t query[kQueryFloats];
  alignas(64) float values[kQueryFloats];
  alignas(64) float scores[kRows * kMaxKeyBlock];
  alignas(64) float sums[kMaxQueryBlock * kWidth];  // sums of the weights so far, one partial sum per lane
  float maxima[kMaxQueryBlock];                     // maxima of the scores so far, times plan.scale
  const int64_t rows = q.count, padded = round_up(rows, kRows);
  std::fill_n(query + rows * steps, (padded - rows) * steps, 0u);
  std::fill_n(values, padded * columns, 0.0f);
  std::fill_n(maxima, rows, kMasked);
  std::fill_n(sums, rows * kWidth, 0.0f);
  for (int64_t r = 0; r < rows; ++r) Units::load_row(q[r], q.width, query + r * steps);

  for (int64_t block = 0; block < plan.key_blocks; ++block, packed += plan.block_units) {
    const int64_t keys = plan.keys_in(block);
    for (int64_t first = 0; first < rows; first += kRows) {
      const int64_t count = std::min<int64_t>(kRows, rows - first);
      float rescale[kRows] = {};
      multiply<Units, Into::kNew>(query + first * steps, steps, count, packed, steps, ceil_div(keys, kWidth), scores,
                                  plan.key_block);
      softmax<Units>(scores, plan.key_block, count, keys, plan.scale, maxima + first, sums + first * kWidth,
                     rescale);
      multiply<Units, Into::kRescaledSum>(reinterpret_cast<const uint32_t*>(scores), plan.key_block, count,
                                          packed + plan.key_units, ceil_div(keys, Units::kPerUnit), plan.head_vectors,
                                          values + first * columns, columns, rescale);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const float total = sum(load(sums + r * kWidth)), inverse = 1.0f / total;
    if (log_sum_exp) log_sum_exp[r] = static_cast<float>(double{maxima[r]} / kLog2E + std::log(double{total}));
    for_lanes(plan.head_dim, [&](int64_t i, int lanes) {
      store_lanes(out + r * out_stride + i, load(values + r * columns + i) * inverse, lanes);
    });
  }
}

template <class Units>
static void attention_of(const AttentionArgs& args) {
  using Element = typename Units::Element;
  const Plan<Units> plan(args);
  const int64_t width = plan.heads * plan.head_dim, heads = args.batch * plan.heads;
  const int64_t threads = team_size(), whole = heads / threads * threads, rest = heads - whole;
  const int64_t head_units = plan.key_blocks * plan.block_units;
  uint32_t* const packed = scratch(std::min(heads, threads) * head_units);

  /// `count` rows of a head's q (part 0), k (1) or v (2).
  const auto rows_of = [&](int64_t head, int64_t part, int64_t start, int64_t count) {
    const Element* q = static_cast<const Element*>(args.qkv) + head / plan.heads * plan.seq * plan.row_stride +
                       head % plan.heads * plan.head_dim;
    return Rows<Element>{q + part * width + start * plan.row_stride, plan.row_stride, count, plan.head_dim};
  };
  const auto pack_block = [&](int64_t head, int64_t block, uint32_t* to) {
    const int64_t start = block * plan.key_block, keys = plan.keys_in(block);
    to += block * plan.block_units;
    pack_transposed<Units>(rows_of(head, 1, start, keys), to);
    pack_rows<Units>(rows_of(head, 2, start, keys), to + plan.key_units);
  };
  const auto attend_block = [&](int64_t head, int64_t block, const uint32_t* from) {
    const int64_t start = block * plan.query_block, rows = std::min(plan.query_block, plan.seq - start);
    Element* out = static_cast<Element*>(args.out) + (head / plan.heads * plan.seq + start) * width +
                   head % plan.heads * plan.head_dim;
    attend<Units>(plan, rows_of(head, 0, start, rows), from, out, width,
                  args.log_sum_exp ? args.log_sum_exp + head * plan.seq + start : nullptr);
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
