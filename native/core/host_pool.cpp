#include "native/core/host_pool.h"

#include <algorithm>
#include <atomic>
#include <iterator>

#include "native/core/device.h"
#include "native/core/parallel.h"

namespace uniflow {
namespace {

/// The team takes commands when there are kEachAtOnce for each member, so that all members finish at about the same time. After kFew it
/// accepts fewer. After kPatience, for example behind a long command, a worker takes a command even while the team is active.
constexpr int64_t kEachAtOnce = 2;
constexpr std::chrono::milliseconds kFew{1}, kPatience{100};

std::atomic<HostPool*> the_pool{nullptr};
std::atomic<bool> team_active{false};

}  // namespace

HostPool::HostPool(int workers) : WorkQueue(Device::cpu()) {
  start_workers(workers, [this] { loop(); });
}

HostPool& HostPool::instance() {
  static HostPool& pool = [&]() -> HostPool& {
    the_pool = new HostPool(default_threads());  // never destroyed, like Device::cpu()
    return *the_pool;
  }();
  return pool;
}

HostPool* HostPool::opened() { return the_pool; }

void HostPool::set_team_active(bool active) {
  team_active = active;
  HostPool* pool = opened();
  if (!pool) return;
  if (active) pool->run_on_team();
  else pool->wake_workers();
}

std::deque<WorkQueue::Entry>::iterator HostPool::next() {
  if (!team_active) return queue_.begin();
  const auto now = Clock::now();
  return std::ranges::find_if(queue_, [&](const Entry& e) { return !e.command.computes || now - e.since >= kPatience; });
}

std::deque<WorkQueue::Entry>::iterator HostPool::wait_for_next(std::unique_lock<std::mutex>& lock) {
  while (true) {
    if (!halted_)
      if (const auto found = next(); found != queue_.end()) return found;
    if (halted_ || queue_.empty()) wake_.wait(lock);
    else wake_.wait_until(lock, queue_.front().since + kPatience);
  }
}

void HostPool::run_on_team() {
  std::vector<Entry> taken;
  {
    std::lock_guard lock(mutex_);
    const auto computes = [](const Entry& e) { return e.command.computes; };
    const auto first = std::ranges::find_if(queue_, computes);
    if (halted_ || first == queue_.end()) return;
    const bool enough = std::ranges::count_if(queue_, computes) >= kEachAtOnce * team_size();
    if (!enough && Clock::now() - first->since < kFew) return;
    const auto rest = std::stable_partition(queue_.begin(), queue_.end(), [&](const Entry& e) { return !computes(e); });
    taken.assign(std::make_move_iterator(rest), std::make_move_iterator(queue_.end()));
    queue_.erase(rest, queue_.end());
    for (const Entry& entry : taken) running_.push_back(&entry);
  }
  parallel_for(static_cast<int64_t>(taken.size()), [&](int64_t i) { run(taken[static_cast<size_t>(i)]); }, /*dynamic=*/true);
}

void HostPool::wake_workers() {
  std::lock_guard lock(mutex_);  // every worker that has checked the queue is waiting by now
  if (std::ranges::any_of(queue_, [](const Entry& e) { return e.command.computes; })) wake_.notify_all();
}

void HostPool::loop() {
  device_.backend().enter(device_);
  set_team_size(1);
  std::unique_lock lock(mutex_);
  while (true) {
    Entry entry;
    take(wait_for_next(lock), entry);
    lock.unlock();
    run(entry);
    lock.lock();
  }
}

}  // namespace uniflow
