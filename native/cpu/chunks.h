/// Chunks of long vectors on the team: the same for any number of threads, so that sums over them are as well.
#pragma once

#include <algorithm>
#include <vector>

#include "native/core/parallel.h"
#include "native/cpu/simd.h"

namespace uniflow::cpu::UNIFLOW_ISA {

constexpr int64_t kChunk = 1 << 14;

/// Calls body(begin, count) for every chunk of [0, n).
template <class Body>
static void for_chunks(int64_t n, Body&& body) {
  parallel_for((n + kChunk - 1) / kChunk, [&](int64_t c) { body(c * kChunk, std::min(kChunk, n - c * kChunk)); });
}

/// Sums body(begin, count) over the chunks, in order.
template <class Body>
static double sum_over_chunks(int64_t n, Body&& body) {
  std::vector<double> partial(static_cast<size_t>((n + kChunk - 1) / kChunk));
  for_chunks(n, [&](int64_t begin, int64_t count) { partial[static_cast<size_t>(begin / kChunk)] = body(begin, count); });
  double total = 0;
  for (double p : partial) total += p;
  return total;
}

}  // namespace uniflow::cpu::UNIFLOW_ISA
