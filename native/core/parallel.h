/// The OpenMP team of a compute thread.
#pragma once

#include <cstdint>

namespace uniflow {

/// Calls body(i) for i in [0, n) on the team; `dynamic` balances uneven work.
/// The body must not throw. Which thread runs which i never changes the result: no body may depend on it.
template <class Body>
inline void parallel_for(int64_t n, Body&& body, bool dynamic = false) {
  if (n == 1) {
    body(int64_t{0});
  } else if (dynamic) {
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t i = 0; i < n; ++i) body(i);
  } else {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; ++i) body(i);
  }
}

/// Calls body(begin, end) on the team for chunks of [0, n) that are the same whatever the number of threads.
template <class Body>
inline void parallel_chunks(int64_t n, Body&& body) {
  constexpr int64_t kChunk = 1 << 14;
  parallel_for((n + kChunk - 1) / kChunk, [&](int64_t i) { body(i * kChunk, (i + 1) * kChunk < n ? (i + 1) * kChunk : n); });
}

}  // namespace uniflow
