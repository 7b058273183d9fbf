#include "native/core/allocator.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <string>

#include "native/core/error.h"

namespace uniflow {
namespace {

constexpr int64_t kMost = int64_t{1} << 46;  // no machine has more, and sums of sizes stay far from overflow
constexpr int64_t kPageBytes = 4096;
constexpr int64_t kMapFrom = 256 << 10;      // blocks this large are mapped, so that freeing returns them at once
constexpr int64_t kHugeFrom = 4 << 20;       // and from here asked for in huge pages: fewer TLB misses in GEMMs

/// The pool never keeps more than this: a quarter of the machine, so that the activations of a training step stay in it.
int64_t pool_limit() {
  static const int64_t limit = std::max<int64_t>(int64_t{1} << 30, sysconf(_SC_PHYS_PAGES) / 4 * sysconf(_SC_PAGESIZE));
  return limit;
}

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/// Eight sizes per power of two: at most 12.5 % is wasted, and nearly equal requests share blocks.
int64_t size_class(int64_t bytes) {
  if (bytes <= 1024) return round_up(std::max<int64_t>(bytes, 1), 64);
  int64_t step = std::bit_floor(static_cast<uint64_t>(bytes)) / 8;
  return round_up(round_up(bytes, step), bytes >= kMapFrom ? kPageBytes : 64);
}

void* system_allocate(int64_t capacity) {
  if (capacity < kMapFrom) return std::aligned_alloc(64, static_cast<size_t>(capacity));
  void* p = mmap(nullptr, static_cast<size_t>(capacity), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) return nullptr;
#ifdef MADV_HUGEPAGE
  if (capacity >= kHugeFrom) madvise(p, static_cast<size_t>(capacity), MADV_HUGEPAGE);
#endif
  return p;
}

void system_release(void* p, int64_t capacity) {
  if (capacity < kMapFrom) std::free(p);
  else munmap(p, static_cast<size_t>(capacity));
}

}  // namespace

Allocator& Allocator::host() {
  static Allocator* instance = new Allocator;  // never destroyed: tensors may outlive static destructors
  return *instance;
}

void* Allocator::take_from_pool(int64_t capacity) {
  auto it = pool_.lower_bound(capacity);
  if (it == pool_.end() || it->first > capacity + capacity / 2) return nullptr;
  void* block = it->second;
  stats_.pool -= it->first;
  lent_.emplace(block, it->first);
  pool_.erase(it);
  return block;
}

void* Allocator::allocate(int64_t bytes, Placement placement) {
  const bool pooled = placement == Placement::Pooled;
  if (bytes < 0 || bytes > kMost) throw Error(ErrorCode::OutOfMemory, "out of host memory: asked for " + std::to_string(bytes) + " bytes");
  const int64_t capacity = pooled ? size_class(bytes) : round_up(std::max<int64_t>(bytes, 1), bytes >= kMapFrom ? kPageBytes : 64);
  std::lock_guard lock(mutex_);
  void* block = pooled ? take_from_pool(capacity) : nullptr;
  if (!block) {
    block = system_allocate(capacity);
    if (!block) {
      throw Error(ErrorCode::OutOfMemory, "out of host memory: asked for " + std::to_string(bytes) + " bytes with " +
                                              std::to_string(stats_.active) + " bytes in use");
    }
    lent_.emplace(block, capacity);
  }
  stats_.active += bytes;
  stats_.peak = std::max(stats_.peak, stats_.active);
  return block;
}

void Allocator::release(void* data, int64_t bytes, Placement placement) noexcept {
  std::lock_guard lock(mutex_);
  stats_.active -= bytes;
  auto it = lent_.find(data);
  const int64_t capacity = it->second;
  lent_.erase(it);
  if (placement == Placement::Pooled && stats_.pool + capacity <= pool_limit()) {
    stats_.pool += capacity;
    pool_.emplace(capacity, data);
  } else {
    system_release(data, capacity);
  }
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
  for (auto& [capacity, block] : pool_) system_release(block, capacity);
  pool_.clear();
  stats_.pool = 0;
}

}  // namespace uniflow
