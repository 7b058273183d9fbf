/// Matrix products, out = epilogue(left right): left [M, K] is packed on the fly, right [K, N] is in panels (tile.h), sums are float32, or int32 of
/// int8 units.
///
/// Algorithm. Rows are cut into even blocks of at most kRowBlock, K into blocks of kStepBlock units. A packed block of the left side and a
/// block of a panel together fit in a second-level cache. For each block of rows and each block of K, the left side is packed; then the
/// micro-kernel multiplies it with each panel, one tile of rows at a time. The first block of K starts a sum, the others are added in
/// order. After the last one, the epilogue turns the tile into output while it is still in the first-level cache.
///
/// Threads. The pairs (block of rows, panel), in this order, are cut into as many even ranges as there are threads.
///
/// A row of the result depends only on that row and the right side: every output is one chain of multiply-adds per block of K, whatever the
/// tile, the block or the thread; sums of integers are exact. FLOPs: 2 M N K.
#pragma once

#include <type_traits>

#include "native/core/parallel.h"
#include "native/cpu/tile.h"

namespace uniflow::cpu::UNIFLOW_ISA {

constexpr int64_t kRowBlock = 96;     // rows of a packed block of the left side; a multiple of kRows
constexpr int64_t kStepBlock = 512;   // units of K at a time
constexpr int64_t kPanelRange = 32;   // panels whose sums are kept until the next block of K
constexpr int64_t kTileSums = kRows / 2 * kPanel * kWidth;

/// Units of a block of a panel whose storage is narrower than its units.
template <class Units>
constexpr int64_t kWidenedSize = std::is_same_v<typename Units::Panel, uint32_t> ? 0 : kStepBlock * kPanel * kWidth;

/// The right side: `vectors` column vectors, `steps` units deep.
template <class Units>
struct Panels {
  const typename Units::Panel* data;
  int64_t steps, vectors;

  int64_t count() const { return ceil_div(vectors, kPanel); }
  PanelRange operator[](int64_t i) const {
    const int64_t panels = count(), first = i * vectors / panels;
    return {first, (i + 1) * vectors / panels - first};
  }
  /// Address of step `step` of a panel.
  const typename Units::Panel* at(PanelRange panel, int64_t step) const { return data + (panel.first * steps + step * panel.vectors) * kWidth; }
  typename Units::Panel* writable(PanelRange panel) const { return const_cast<typename Units::Panel*>(at(panel, 0)); }
  int64_t size() const { return steps * vectors * kWidth; }
};

/// Packs a right side from the rows of its transpose, on the team.
template <class Units>
static void pack_right_transposed(const Rows<typename Units::Element>& in, const Panels<Units>& to) {
  const int64_t pieces = ceil_div(to.steps, kPackSteps);
  parallel_for(to.count() * pieces, [&](int64_t i) {
    const PanelRange panel = to[i / pieces];
    const int64_t begin = i % pieces * kPackSteps;
    pack_transposed<Units>(in, panel, begin, std::min(begin + kPackSteps, to.steps), to.writable(panel));
  });
}

/// Packs a right side from its rows, on the team. It packs few rows at a time through all panels, so the rows are read sequentially.
template <class Units>
static void pack_right_rows(const Rows<typename Units::Element>& in, const Panels<Units>& to) {
  constexpr int64_t kSteps = 16;
  parallel_for(ceil_div(to.steps, kSteps), [&](int64_t i) {
    for (int64_t p = 0; p < to.count(); ++p)
      pack_rows<Units>(in, to[p], i * kSteps, std::min((i + 1) * kSteps, to.steps), to.writable(to[p]));
  });
}

/// The left side, untransposed: a row of the product comes from a row of x.
template <class Units>
struct RowsLeft {
  static constexpr bool kTransposed = false;
  Rows<typename Units::Element> x;

  int64_t rows() const { return x.count; }
  static int64_t stride(int64_t, int64_t steps) { return steps + 16; }  // rows a power of two apart would share few cache sets
  static int64_t size(int64_t rows, int64_t steps) { return rows * stride(rows, steps); }

  /// Packs rows [first, first + rows), with zeros for rows beyond the last, and steps [begin, end).
  void pack(int64_t first, int64_t rows, int64_t begin, int64_t end, uint32_t* out) const {
    const int64_t from = begin * Units::kPerUnit, n = std::min(end * Units::kPerUnit, x.width) - from;
    for (int64_t r = 0; r < rows; ++r, out += stride(rows, end - begin)) {
      if (first + r < x.count) Units::Left::load_row(x[first + r] + from, n, out);
      else std::fill_n(out, end - begin, 0u);
    }
  }
};

/// The left side, transposed: a row of the product comes from a column of x, and K runs along the rows of x.
template <class Units>
struct ColumnsLeft {
  static constexpr bool kTransposed = true;
  Rows<typename Units::Element> x;

  int64_t rows() const { return x.width; }
  static int64_t stride(int64_t rows, int64_t) { return round_up(rows, kWidth); }
  static int64_t size(int64_t rows, int64_t steps) { return steps * stride(rows, steps); }

  void pack(int64_t first, int64_t rows, int64_t begin, int64_t end, uint32_t* out) const {
    const int64_t there = std::min(rows, x.width - first);
    for (int64_t s = begin; s < end; ++s, out += stride(rows, 0)) {
      const int64_t row = s * Units::kPerUnit;
      const auto* even = x[row] + first;
      const auto* odd = row + 1 < x.count ? even + x.stride : nullptr;
      for (int64_t i = 0; i < Units::kPerUnit; ++i) x.prefetch(row + kPrefetchRows + i, first, there);
      for_lanes(there, [&](int64_t i, int lanes) { store(out + i, Units::Left::interleave(even + i, odd ? odd + i : nullptr, lanes)); });
      for (int64_t i = round_up(there, kWidth); i < rows; i += kWidth) store(out + i, vu{});
    }
  }
};

template <class Units, class Left, class Epilogue>
class Gemm {
 public:
  Gemm(const Left& left, const Panels<Units>& right, const Epilogue& epilogue) : left_(left), right_(right), epilogue_(epilogue) {}

  void run() const {
    const int64_t panels = right_.count(), threads = team_size(), units = ceil_div(left_.rows(), kRows);
    const int64_t blocks = std::min(units, std::max(ceil_div(left_.rows(), kRowBlock), ceil_div(threads, panels)));
    const int64_t count = std::min(threads, blocks * panels);
    parallel_for(count, [&](int64_t thread) {
      const int64_t end = (thread + 1) * blocks * panels / count;
      for (int64_t i = thread * blocks * panels / count; i < end;) {
        const int64_t block = i / panels, panel = i % panels, n = std::min({panels - panel, end - i, kPanelRange});
        const int64_t first = block * units / blocks * kRows;
        multiply_block(first, (block + 1) * units / blocks * kRows - first, panel, panel + n);
        i += n;
      }
    });
  }

 private:
  /// Multiplies rows [first, first + rows), a multiple of kRows, with panels [begin, end).
  void multiply_block(int64_t first, int64_t rows, int64_t begin, int64_t end) const {
    const int64_t step_blocks = ceil_div(right_.steps, kStepBlock), left_size = round_up(Left::size(rows, std::min(right_.steps, kStepBlock)), 16);
    const int64_t panel_size = rows * kPanel * kWidth;  // sums
    uint32_t* const packed = scratch(left_size + kWidenedSize<Units> + (step_blocks == 1 ? kTileSums : (end - begin) * panel_size));
    auto* const sums = reinterpret_cast<SumElement<Units>*>(packed + left_size + kWidenedSize<Units>);
    for (int64_t b = 0; b < step_blocks; ++b) {
      const int64_t step = b * kStepBlock, steps = std::min(kStepBlock, right_.steps - step);
      left_.pack(first, rows, step, step + steps, packed);
      for (int64_t p = begin; p < end; ++p) {
        const auto* next = p + 1 < end ? right_.at(right_[p + 1], step) : b + 1 < step_blocks ? right_.at(right_[begin], step + steps) : nullptr;
        const Block block{first, rows, step, steps, p, packed, packed + left_size, next};
        with_vectors(right_[p].vectors, [&]<int Vectors>() {
          auto* const kept = step_blocks == 1 ? nullptr : sums + (p - begin) * panel_size;
          if (step == 0) multiply_panel<Into::kNew, Vectors>(block, kept, sums);
          else multiply_panel<Into::kSum, Vectors>(block, kept, sums);
        });
      }
    }
  }

  /// A block of rows times a block of steps of one panel.
  struct Block {
    int64_t first, rows, step, steps, panel;
    const uint32_t* left;                // packed
    uint32_t* widened;                   // buffer for the panel as units
    const typename Units::Panel* next;  // the next operand to prefetch, or null
  };

  /// `kept`: the panel's sums, stored until the next block of steps; null if there is no next block, and then `tile` suffices.
  template <Into kInto, int Vectors>
  void multiply_panel(const Block& b, SumElement<Units>* kept, SumElement<Units>* tile) const {
    constexpr int kTileRows = tile_rows(Vectors), kColumns = Vectors * kWidth;
    const PanelRange panel = right_[b.panel];
    const int64_t stride = Left::stride(b.rows, b.steps), end = std::min(b.rows, left_.rows() - b.first);
    const uint32_t* const units = as_units(right_.at(panel, b.step), b.steps * kColumns, b.widened);
    // While multiplying this panel, the tiles prefetch an even share of the next one in every step.
    const int64_t all_steps = ceil_div(end, kTileRows) * b.steps;
    const int64_t next_step = b.next ? ceil_div(b.steps * kColumns * static_cast<int64_t>(sizeof(*b.next)), all_steps) : 0;
    const char* next = reinterpret_cast<const char*>(b.next ? b.next : right_.at(panel, b.step));
    for (int64_t r = 0; r < end; r += kTileRows, next += b.steps * next_step) {
      auto* const out = kept ? kept + r * kColumns : tile;
      multiply_tile<typename Units::Left, kInto, Left::kTransposed, kTileRows, Vectors, true>(b.left + (Left::kTransposed ? r : r * stride), stride, units, b.steps,
                                                                                             out, kColumns, nullptr, next, next_step);
      if (b.step + b.steps == right_.steps) epilogue_(out, kColumns, b.first + r, std::min<int64_t>(kTileRows, end - r), panel.first * kWidth);
    }
  }

  static const uint32_t* as_units(const uint32_t* panel, int64_t, uint32_t*) { return panel; }
  template <class Narrow>
  static const uint32_t* as_units(const Narrow* panel, int64_t n, uint32_t* widened) {
    for (int64_t i = 0; i < n; i += kWidth) store(widened + i, Units::load_panel(panel + i));
    return widened;
  }

  const Left& left_;
  const Panels<Units>& right_;
  const Epilogue& epilogue_;
};

/// Calls epilogue(tile, stride, first row, rows, first column) for every tile of sums of the product; columns beyond the last are zero.
template <class Units, class Left, class Epilogue>
static void gemm(const Left& left, const Panels<Units>& right, const Epilogue& epilogue) {
  Gemm<Units, Left, Epilogue>(left, right, epilogue).run();
}

}  // namespace uniflow::cpu::UNIFLOW_ISA
