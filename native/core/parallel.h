/// Loops on the thread team.
#pragma once

#include <cstdint>
#include <memory>

#include "native/core/team.h"

namespace uniflow {

/// Calls body(i) for i in [0, n) on the team; `dynamic` balances uneven work. The body must not throw, nor wait for another i. The result
/// must not depend on which thread runs which i.
template <class Body>
inline void parallel_for(int64_t n, Body&& body, bool dynamic = false) {
  if (n == 1) {
    body(int64_t{0});
    return;
  }
  const auto each = std::addressof(body);
  const auto run = [](const void* erased, int64_t begin, int64_t end) {
    auto& item = **static_cast<decltype(each)*>(erased);
    for (int64_t i = begin; i < end; ++i) item(i);
  };
  run_region(n, dynamic ? Schedule::Dynamic : Schedule::Static, {run, &each});
}

/// Calls body(begin, end) on the team for chunks of [0, n). The chunks are the same for any number of threads.
template <class Body>
inline void parallel_chunks(int64_t n, Body&& body) {
  constexpr int64_t kChunk = 1 << 14;
  parallel_for((n + kChunk - 1) / kChunk, [&](int64_t i) { body(i * kChunk, (i + 1) * kChunk < n ? (i + 1) * kChunk : n); });
}

}  // namespace uniflow
