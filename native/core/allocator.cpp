#include "native/core/allocator.h"

#include <algorithm>
#include <bit>
#include <string>

#include "native/core/error.h"

namespace uniflow {
namespace {

constexpr int64_t kMost = int64_t{1} << 46;  // more than any machine has; sums of sizes cannot overflow
constexpr int64_t kPageBytes = 4096;
constexpr int64_t kPagesFrom = 256 << 10;  // larger blocks are rounded up to whole pages

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

int64_t granule(int64_t bytes) { return bytes >= kPagesFrom ? kPageBytes : 64; }

/// Eight sizes per power of two: at most 12.5 % is wasted, and nearly equal requests share blocks.
int64_t size_class(int64_t bytes) {
  if (bytes <= 1024) return round_up(std::max<int64_t>(bytes, 1), 64);
  const int64_t step = std::bit_floor(static_cast<uint64_t>(bytes)) / 8;
  return round_up(round_up(bytes, step), granule(bytes));
}

}  // namespace

void* Allocator::take_from_pool(Pool& pool, int64_t capacity) {
  auto it = pool.lower_bound(capacity);
  if (it == pool.end() || it->first > capacity + capacity / 2) return nullptr;
  void* block = it->second;
  stats_.pool -= it->first;
  lent_.emplace(block, it->first);
  pool.erase(it);
  return block;
}

void* Allocator::take_from_source(int64_t bytes, int64_t capacity) {
  void* block = source_.allocate(capacity);
  if (!block && stats_.pool > 0) {
    empty_pools();
    block = source_.allocate(capacity);
  }
  if (!block) {
    throw Error(ErrorCode::OutOfMemory, "out of " + source_.name() + ": asked for " + std::to_string(bytes) + " bytes with " +
                                            std::to_string(stats_.active) + " bytes in use");
  }
  lent_.emplace(block, capacity);
  return block;
}

void* Allocator::allocate(int64_t bytes, Placement placement) {
  if (bytes < 0 || bytes > kMost) throw Error(ErrorCode::OutOfMemory, "out of " + source_.name() + ": asked for " + std::to_string(bytes) + " bytes");
  const bool pooled = placement != Placement::Persistent;
  const int64_t capacity = pooled ? size_class(bytes) : round_up(std::max<int64_t>(bytes, 1), granule(bytes));
  std::lock_guard lock(mutex_);
  void* block = pooled ? take_from_pool(pool_of(placement), capacity) : nullptr;
  if (!block) block = take_from_source(bytes, capacity);
  stats_.active += bytes;
  stats_.peak = std::max(stats_.peak, stats_.active);
  return block;
}

void Allocator::release(void* data, int64_t bytes, Placement placement) noexcept {
  int64_t capacity;
  {
    std::lock_guard lock(mutex_);
    stats_.active -= bytes;
    auto it = lent_.find(data);
    capacity = it->second;
    lent_.erase(it);
    if (placement != Placement::Persistent && stats_.pool + capacity <= source_.pool_limit()) {
      stats_.pool += capacity;
      pool_of(placement).emplace(capacity, data);
      return;
    }
  }
  source_.release(data, capacity);  // without the lock: it may take long
}

MemoryStats Allocator::stats() const {
  std::lock_guard lock(mutex_);
  return stats_;
}

void Allocator::reset_peak() {
  std::lock_guard lock(mutex_);
  stats_.peak = stats_.active;
}

void Allocator::trim() {
  std::lock_guard lock(mutex_);
  empty_pools();
}

void Allocator::empty_pools() {
  for (Pool* pool : {&pool_, &transfers_}) {
    for (auto& [capacity, block] : *pool) source_.release(block, capacity);
    pool->clear();
  }
  stats_.pool = 0;
}

}  // namespace uniflow
