/// The backward pass of multi-head self-attention, without an S x S matrix in memory. Any S >= 1, 1 <= E <= kMaxHeadDim, scale > 0.
///
/// Algorithm. p = exp(scale * q k^T - log_sum_exp) is recomputed; delta = sum(d_out * out) per query. Then
///   d_v = p^T d_out;  d_s = p * (d_out v^T - delta);  d_q = scale * d_s k;  d_k = scale * d_s^T q.
/// Scores are stored transposed, keys x queries. For each key block, for each query block,
///   for each group of kGroup keys: p^T, d_s^T of the group with all queries of the block; d_v += p^T d_out; d_k += d_s^T q;
///   then d_q += d_s k over all keys of the block.
/// So d_k and d_v of a key block are sums over the query blocks in order, and d_q is a sum of one product per key block, in order.
///
/// Threads take whole heads while there is a head for every thread. The remaining heads are split by key blocks, each with its own d_q;
/// adding these in order gives the same bits as a whole head. So the result depends only on the head's rows, not on the batch or the
/// threads.
///
/// Packed (attention_tile.h), by query block: q and d_out, transposed for the scores and untransposed for d_k and d_v; by key block: k,
/// untransposed, for d_q. The left sides of products are rows of units: k and v; p^T and d_s^T, stored over the scores they were computed
/// from; and d_s, which is d_s^T with the keys paired into units, read by columns.
///
/// Tolerances, relative L2: 5e-6 in float32; 1.5e-2 in bfloat16, where p and d_s are rounded before they are multiplied.
#include <algorithm>
#include <atomic>

#include "native/core/parallel.h"
#include "native/cpu/attention_tile.h"
#include "native/cpu/kernels.h"

namespace uniflow::cpu::UNIFLOW_ISA {
namespace {

constexpr int64_t kQueryBlock = 256, kKeyBlock = 128;  // approximate tokens per block; see Plan
constexpr int64_t kGroup = 2 * kRows;                  // keys whose scores exist at the same time
constexpr int64_t kLine = 16;                          // units per cache line

/// Sizes of a call, in tokens, units or floats as the names say. They keep every array aligned to a cache line.
template <class Units>
struct Plan {
  explicit Plan(const AttentionBackwardArgs& a)
      : seq(a.seq), head_dim(a.head_dim), heads(a.heads), width(heads * head_dim), steps(ceil_div(head_dim, Units::kPerUnit)),
        vectors(ceil_div(head_dim, kWidth)), columns(vectors * kWidth), scale(a.scale) {
    // Equal blocks: a last block of a few tokens would cost as much overhead as a full one.
    query_blocks = std::max<int64_t>(1, (seq + kQueryBlock / 2) / kQueryBlock);
    query_block = round_up(ceil_div(seq, query_blocks), 2 * kLine);
    query_blocks = ceil_div(seq, query_block);
    key_blocks = std::max<int64_t>(1, (seq + kKeyBlock / 2) / kKeyBlock);
    key_block = round_up(ceil_div(seq, key_blocks), kRows);
    key_blocks = ceil_div(seq, key_block);

    transposed_units = steps * query_block;
    rows_units = query_block / Units::kPerUnit * columns;
    query_units = 2 * (transposed_units + rows_units + query_block);
    d_q_floats = round_up(query_block, kRows) * columns;
    // An odd number of lines; otherwise the units of a column would share few cache sets.
    score_stride = query_block + kLine;
    score_floats = kGroup * score_stride;
    key_rows_units = round_up(key_block * steps, kLine);
    key_columns_units = round_up(key_block * columns, kLine);
    d_s_units = key_block / Units::kPerUnit * score_stride;
    workspace_units = 2 * key_rows_units + 3 * key_columns_units + 2 * score_floats + d_s_units;
  }

  int64_t queries_in(int64_t block) const { return std::min(query_block, seq - block * query_block); }
  int64_t keys_in(int64_t block) const { return std::min(key_block, seq - block * key_block); }

  int64_t seq, head_dim, heads, width, steps, vectors, columns;
  float scale;
  int64_t query_blocks, query_block, key_blocks, key_block;
  int64_t transposed_units, rows_units;       // of q, or of d_out, in a query block
  int64_t query_units;                        // of everything packed for a query block
  int64_t d_q_floats;                         // per query block
  int64_t score_stride, score_floats;         // per group
  int64_t key_rows_units, key_columns_units;  // of a key block, with head_dim along the units, or along the columns
  int64_t d_s_units, workspace_units;
};

/// The packed data of a query block.
struct Queries {
  template <class Units>
  Queries(const Plan<Units>& plan, uint32_t* at)
      : q_transposed(at), d_out_transposed(q_transposed + plan.transposed_units),
        q(d_out_transposed + plan.transposed_units), d_out(q + plan.rows_units),
        log_sum(reinterpret_cast<float*>(d_out + plan.rows_units)), delta(log_sum + plan.query_block) {}

  uint32_t *q_transposed, *d_out_transposed, *q, *d_out;  // panels
  float *log_sum, *delta;                                 // [query_block]; log_sum to base 2
};

/// A thread's working memory for a key block.
struct Workspace {
  template <class Units>
  Workspace(const Plan<Units>& plan, uint32_t* at)
      : k_rows(at), v_rows(k_rows + plan.key_rows_units), k(v_rows + plan.key_rows_units),
        d_s(k + plan.key_columns_units), d_k(reinterpret_cast<float*>(d_s + plan.d_s_units)),
        d_v(d_k + plan.key_columns_units), scores(d_v + plan.key_columns_units), d_scores(scores + plan.score_floats) {}

  uint32_t *k_rows, *v_rows;  // [key_block][steps]
  uint32_t* k;                // panels
  uint32_t* d_s;              // [key_block / kPerUnit][score_stride]
  float *d_k, *d_v;           // [key_block][columns]
  float *scores, *d_scores;   // [kGroup][score_stride], then p^T and d_s^T
};

/// Packs a query block.
template <class Units, class Rows>
static void pack_queries(const Plan<Units>& plan, const Rows& q, const Rows& out, const Rows& d_out,
                         const float* log_sum_exp, const Queries& to) {
  pack_transposed<Units>(q, to.q_transposed);
  pack_transposed<Units>(d_out, to.d_out_transposed);
  pack_rows<Units>(q, to.q);
  pack_rows<Units>(d_out, to.d_out);
  for (int64_t r = 0; r < q.count; ++r) {
    to.log_sum[r] = static_cast<float>(double{log_sum_exp[r]} * kLog2E);
    vf delta = {};
    for_lanes(plan.head_dim, [&](int64_t i, int lanes) { delta += load_lanes(out[r] + i, lanes) * load_lanes(d_out[r] + i, lanes); });
    to.delta[r] = sum(delta);
  }
  // Missing queries get finite weights, which are only multiplied by zeros.
  std::fill(to.log_sum + q.count, to.log_sum + plan.query_block, 0.0f);
  std::fill(to.delta + q.count, to.delta + plan.query_block, 0.0f);
}

/// Packs a key block and zeroes its sums.
template <class Units, class Rows>
static void pack_keys(const Plan<Units>& plan, const Rows& k, const Rows& v, const Workspace& to) {
  for (int64_t r = 0; r < k.count; ++r) {
    k.prefetch(r + kPrefetchRows);
    v.prefetch(r + kPrefetchRows);
    Units::load_row(k[r], k.width, to.k_rows + r * plan.steps);
    Units::load_row(v[r], v.width, to.v_rows + r * plan.steps);
  }
  const int64_t padding = (plan.key_block - k.count) * plan.steps;
  std::fill_n(to.k_rows + k.count * plan.steps, padding, 0u);
  std::fill_n(to.v_rows + k.count * plan.steps, padding, 0u);
  pack_rows<Units>(k, to.k);
  std::fill_n(to.d_k, plan.key_columns_units, 0.0f);
  std::fill_n(to.d_v, plan.key_columns_units, 0.0f);
}

/// For a group of `keys` keys, turns the transposed q k^T into p^T and d_out v^T into d_s^T, in place, and copies d_s^T to d_s.
template <class Units>
static void weigh(const Plan<Units>& plan, const Queries& queries, int64_t keys, int64_t count, const Workspace& w,
                  uint32_t* d_s) {
  using Stored = typename Units::Stored;
  const float scale = plan.scale * static_cast<float>(kLog2E);
  const int64_t stride = plan.score_stride;
  for (int64_t r = 0; r < keys; ++r) {
    float *const score = w.scores + r * stride, *const d_score = w.d_scores + r * stride;
    for (int64_t i = 0; i < count; i += 2 * kWidth) {
      vf p[2], d[2];
      for (int64_t h = 0, at = i; h < 2; ++h, at += kWidth) {
        p[h] = exp2<Units>(load(score + at) * scale - load(queries.log_sum + at));
        d[h] = p[h] * (load(d_score + at) - load(queries.delta + at));
      }
      Units::store_row(score, i, p[0], p[1]);
      Units::store_row(d_score, i, d[0], d[1]);
    }
  }
  for (int64_t r = 0; r < keys; r += Units::kPerUnit, d_s += stride) {
    const Stored* even = reinterpret_cast<const Stored*>(w.d_scores + r * stride);
    const Stored* odd = r + 1 < keys ? reinterpret_cast<const Stored*>(w.d_scores + (r + 1) * stride) : nullptr;
    for (int64_t i = 0; i < count; i += kWidth) store(d_s + i, Units::interleave(even + i, odd ? odd + i : nullptr, kWidth));
  }
}

/// Processes one key block with one query block of `count` queries: adds to d_k and d_v in w, and to d_q.
template <class Units>
static void backward_block(const Plan<Units>& plan, const Queries& queries, int64_t count, int64_t keys,
                           const Workspace& w, float* d_q) {
  const int64_t stride = plan.score_stride, columns = plan.columns, vectors = ceil_div(count, kWidth);
  for (int64_t first = 0; first < keys; first += kGroup) {
    const int64_t group = std::min(kGroup, keys - first), steps = ceil_div(count, Units::kPerUnit);
    multiply<Units, Into::kNew>(w.k_rows + first * plan.steps, plan.steps, group, queries.q_transposed, plan.steps, vectors,
                                w.scores, stride);
    multiply<Units, Into::kNew>(w.v_rows + first * plan.steps, plan.steps, group, queries.d_out_transposed, plan.steps,
                                vectors, w.d_scores, stride);
    weigh<Units>(plan, queries, group, count, w, w.d_s + first / Units::kPerUnit * stride);
    multiply<Units, Into::kSum>(reinterpret_cast<const uint32_t*>(w.scores), stride, group, queries.d_out, steps,
                                plan.vectors, w.d_v + first * columns, columns);
    multiply<Units, Into::kSum>(reinterpret_cast<const uint32_t*>(w.d_scores), stride, group, queries.q, steps,
                                plan.vectors, w.d_k + first * columns, columns);
  }
  multiply<Units, Into::kSum, /*kTransposed=*/true>(w.d_s, stride, count, w.k, ceil_div(keys, Units::kPerUnit), plan.vectors,
                                                    d_q, columns);
}

/// out = scale * the sum, in order, of `parts` matrices `part_floats` apart; rows [0, rows) of `columns`.
template <class Units>
static void store_sum(const Plan<Units>& plan, const float* in, int64_t parts, int64_t part_floats, int64_t rows, float scale,
                      typename Units::Element* out) {
  for (int64_t r = 0; r < rows; ++r, in += plan.columns, out += 3 * plan.width)
    for_lanes(plan.head_dim, [&](int64_t i, int lanes) {
      vf total = load(in + i);
      for (int64_t p = 1; p < parts; ++p) total += load(in + p * part_floats + i);
      store_lanes(out + i, total * scale, lanes);
    });
}

/// Calls body(slot, i) for i in [0, n). At any time, each slot < `slots` is used by at most one thread.
template <class Body>
static void share(int64_t slots, int64_t n, Body&& body) {
  std::atomic<int64_t> next{0};
  parallel_for(std::min(slots, n), [&](int64_t slot) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) body(slot, i);
  });
}

/// One call of the backward pass.
template <class Units>
class Backward {
 public:
  explicit Backward(const AttentionBackwardArgs& args) : args_(args), plan_(args) {}

  void run() {
    const int64_t heads = args_.batch * plan_.heads, threads = team_size();
    const int64_t whole = heads / threads * threads, rest = heads - whole;
    const int64_t query_blocks = plan_.query_blocks, key_blocks = plan_.key_blocks;
    const int64_t head_units = query_blocks * plan_.query_units, d_q_floats = query_blocks * plan_.d_q_floats;
    const int64_t packed_units = std::min(heads, threads) * head_units;
    const int64_t d_q_total = std::max(whole == 0 ? 0 : threads, rest * key_blocks) * d_q_floats;
    uint32_t* const packed = scratch(packed_units + d_q_total + threads * plan_.workspace_units);
    float* const d_q = reinterpret_cast<float*>(packed + packed_units);
    const auto workspace = [&](int64_t slot) {
      return Workspace(plan_, packed + packed_units + d_q_total + slot * plan_.workspace_units);
    };

    share(threads, whole, [&](int64_t slot, int64_t head) {
      uint32_t* const queries = packed + slot * head_units;
      float* const sums = d_q + slot * d_q_floats;
      for (int64_t block = 0; block < query_blocks; ++block) pack(head, block, queries);
      std::fill_n(sums, d_q_floats, 0.0f);
      for (int64_t block = 0; block < key_blocks; ++block) key_block(head, block, queries, workspace(slot), sums);
      for (int64_t block = 0; block < query_blocks; ++block) store_d_q(head, block, sums, 1);
    });
    share(threads, rest * query_blocks, [&](int64_t, int64_t i) {
      const int64_t n = i / query_blocks;
      pack(whole + n, i % query_blocks, packed + n * head_units);
    });
    share(threads, rest * key_blocks, [&](int64_t slot, int64_t i) {
      const int64_t n = i / key_blocks;
      std::fill_n(d_q + i * d_q_floats, d_q_floats, 0.0f);
      key_block(whole + n, i % key_blocks, packed + n * head_units, workspace(slot), d_q + i * d_q_floats);
    });
    share(threads, rest * query_blocks, [&](int64_t, int64_t i) {
      const int64_t n = i / query_blocks;
      store_d_q(whole + n, i % query_blocks, d_q + n * key_blocks * d_q_floats, key_blocks);
    });
  }

 private:
  using Element = typename Units::Element;

  /// Offset of a head's token in a matrix with rows of `parts` * width elements, in part `part`.
  int64_t offset(int64_t head, int64_t token, int64_t parts, int64_t part) const {
    return ((head / plan_.heads * plan_.seq + token) * parts + part) * plan_.width + head % plan_.heads * plan_.head_dim;
  }
  Rows<Element> rows(const void* data, int64_t head, int64_t token, int64_t count, int64_t parts = 1,
                         int64_t part = 0) const {
    return {static_cast<const Element*>(data) + offset(head, token, parts, part), parts * plan_.width, count, plan_.head_dim};
  }
  Element* d_qkv(int64_t head, int64_t token, int64_t part) const {
    return static_cast<Element*>(args_.d_qkv) + offset(head, token, 3, part);
  }

  void pack(int64_t head, int64_t block, uint32_t* packed) const {
    const int64_t start = block * plan_.query_block, count = plan_.queries_in(block);
    pack_queries<Units>(plan_, rows(args_.qkv, head, start, count, 3, 0), rows(args_.out, head, start, count),
                        rows(args_.d_out, head, start, count), args_.log_sum_exp + head * plan_.seq + start,
                        Queries(plan_, packed + block * plan_.query_units));
  }

  void key_block(int64_t head, int64_t block, uint32_t* packed, const Workspace& w, float* d_q) const {
    const int64_t start = block * plan_.key_block, keys = plan_.keys_in(block);
    pack_keys<Units>(plan_, rows(args_.qkv, head, start, keys, 3, 1), rows(args_.qkv, head, start, keys, 3, 2), w);
    for (int64_t i = 0; i < plan_.query_blocks; ++i)
      backward_block<Units>(plan_, Queries(plan_, packed + i * plan_.query_units), plan_.queries_in(i), keys, w,
                            d_q + i * plan_.d_q_floats);
    store_sum<Units>(plan_, w.d_k, 1, 0, keys, plan_.scale, d_qkv(head, start, 1));
    store_sum<Units>(plan_, w.d_v, 1, 0, keys, 1, d_qkv(head, start, 2));
  }

  void store_d_q(int64_t head, int64_t block, const float* d_q, int64_t parts) const {
    store_sum<Units>(plan_, d_q + block * plan_.d_q_floats, parts, plan_.query_blocks * plan_.d_q_floats,
                     plan_.queries_in(block), plan_.scale, d_qkv(head, block * plan_.query_block, 0));
  }

  const AttentionBackwardArgs& args_;
  const Plan<Units> plan_;
};

}  // namespace

/// Adding one vector to all keys of a head shifts each row of scores and changes no probability, so the gradients of the keys sum to zero.
/// Rounding leaves a remainder of 1e-7 of them. Adam's steps do not shrink with the gradient, so it would turn the remainder into a drift
/// of the key bias. This removes the remainder, as far as float32 can resolve it.
static void center_keys(const AttentionBackwardArgs& a) {
  const int64_t width = a.heads * a.head_dim, stride = 3 * width;
  parallel_for(a.batch * a.heads, [&](int64_t i) {
    float* keys = static_cast<float*>(a.d_qkv) + i / a.heads * a.seq * stride + width + i % a.heads * a.head_dim;
    for_lanes(a.head_dim, [&](int64_t c, int lanes) {
      vf total = {};
      for (int64_t s = 0; s < a.seq; ++s) total += load_lanes(keys + s * stride + c, lanes);
      const vf mean = total / static_cast<float>(a.seq);
      for (int64_t s = 0; s < a.seq; ++s) store_lanes(keys + s * stride + c, load_lanes(keys + s * stride + c, lanes) - mean, lanes);
    });
  });
}

void attention_backward(const AttentionBackwardArgs& args) {
  if (args.dtype == DType::Float32) {
    Backward<FloatUnits<float>>(args).run();
    return center_keys(args);
  }
#if defined(__AVX512BF16__)
  Backward<PairUnits>(args).run();
#else
  Backward<FloatUnits<bf16>>(args).run();
#endif
}

}  // namespace uniflow::cpu::UNIFLOW_ISA
