/// Memory for tensors. Activations come from a pool that does not grow in a steady loop. Weights come from the system (or the GPU's driver)
/// and return to it as soon as they are freed. A pool reuses blocks in the order of the device's stream, so reuse never waits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>

#include "native/core/backend.h"

namespace uniflow {

/// Pooled: kept for the next tensor of about that size. Persistent: returned to the system when freed. Transfer: pooled, but reused only
/// after all work on it has ended, so an upload need not wait for earlier work. Staging: pooled host memory with fast transfers to and from
/// the device.
enum class Placement { Pooled, Persistent, Transfer, Staging };

struct MemoryStats {
  int64_t active;  // bytes in live tensors
  int64_t peak;    // highest `active` since start or reset_peak
  int64_t pool;    // bytes kept for reuse
};

class Allocator {
 public:
  explicit Allocator(Memory& source) : source_(source) {}

  /// 64-byte aligned, contents undefined. If the source is exhausted, the pool's memory is returned to it and the allocation is retried.
  /// Throws Error(OutOfMemory) with the sizes.
  void* allocate(int64_t bytes, Placement placement);
  void release(void* data, int64_t bytes, Placement placement) noexcept;

  MemoryStats stats() const;
  void reset_peak();
  /// Returns the pool's memory to the system.
  void trim();

 private:
  using Pool = std::multimap<int64_t, void*>;  // capacity -> block
  Pool& pool_of(Placement placement) { return placement == Placement::Transfer ? transfers_ : pool_; }
  void* take_from_pool(Pool& pool, int64_t capacity);
  void* take_from_source(int64_t bytes, int64_t capacity);
  void empty_pools();

  Memory& source_;
  mutable std::mutex mutex_;
  Pool pool_, transfers_;
  std::map<void*, int64_t> lent_;       // block -> its capacity
  MemoryStats stats_{};
};

}  // namespace uniflow
