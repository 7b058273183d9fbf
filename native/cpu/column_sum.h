/// Sums over rows, identical for any number of threads: rows are summed in fixed groups, groups in order.
#pragma once

#include <vector>

#include "native/core/parallel.h"
#include "native/cpu/simd.h"

namespace uniflow::cpu::UNIFLOW_ISA {

constexpr int64_t kRowsPerGroup = 64;

static inline int64_t row_groups(int64_t rows) { return (rows + kRowsPerGroup - 1) / kRowsPerGroup; }

template <class Body>
static inline void for_rows(int64_t group, int64_t rows, Body&& body) {
  const int64_t end = (group + 1) * kRowsPerGroup < rows ? (group + 1) * kRowsPerGroup : rows;
  for (int64_t r = group * kRowsPerGroup; r < end; ++r) body(r);
}

/// One sum [width]; if out is null, nothing is summed.
class ColumnSum {
 public:
  ColumnSum(float* out, int64_t rows, int64_t width) : out_(out), groups_(row_groups(rows)), width_(width) {
    if (out) partials_.assign(static_cast<size_t>(groups_ * width), 0.0f);
  }

  /// The accumulator of a group, or null.
  float* partial(int64_t group) { return out_ ? partials_.data() + group * width_ : nullptr; }

  void finish() {
    if (!out_) return;
    constexpr int64_t kColumns = 256;
    parallel_for((width_ + kColumns - 1) / kColumns, [&](int64_t block) {
      const int64_t begin = block * kColumns, n = begin + kColumns < width_ ? kColumns : width_ - begin;
      for_lanes(n, [&](int64_t i, int lanes) {
        vf total = {};
        for (int64_t g = 0; g < groups_; ++g) total += load_lanes(partials_.data() + g * width_ + begin + i, lanes);
        store_lanes(out_ + begin + i, total, lanes);
      });
    });
  }

 private:
  float* out_;
  int64_t groups_, width_;
  std::vector<float> partials_;
};

}  // namespace uniflow::cpu::UNIFLOW_ISA
