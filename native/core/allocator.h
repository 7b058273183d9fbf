/// Host memory for tensors: activations from a pool that a steady loop never grows, weights from the
/// system and back to it the moment they are freed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>

namespace uniflow {

/// Pooled: kept for the next tensor of about that size. Persistent: returned to the system when freed.
enum class Placement { Pooled, Persistent };

struct MemoryStats {
  int64_t active;  // bytes in live tensors
  int64_t peak;    // highest `active` since start or reset_peak
  int64_t pool;    // bytes kept for reuse
};

class Allocator {
 public:
  static Allocator& host();

  /// 64-byte aligned, contents undefined. Throws Error(OutOfMemory) with the sizes.
  void* allocate(int64_t bytes, Placement placement);
  void release(void* data, int64_t bytes, Placement placement) noexcept;

  MemoryStats stats() const;
  void reset_peak();
  /// Returns the pool's memory to the system.
  void trim();

 private:
  void* take_from_pool(int64_t capacity);

  mutable std::mutex mutex_;
  std::multimap<int64_t, void*> pool_;  // capacity -> block
  std::map<void*, int64_t> lent_;       // block -> its capacity
  MemoryStats stats_{};
};

}  // namespace uniflow
