#include "native/core/stream.h"

#include "native/core/device.h"
#include "native/core/host_pool.h"
#include "native/core/team.h"

namespace uniflow {
namespace {

/// Commands that touch fewer bytes than this run on the stream's own thread. They would finish before a team has assembled, and on a busy
/// machine they would wait for its slowest member.
constexpr int64_t kAlone = 256 << 10;

int team_for(const Command& c, int threads) {
  int64_t bytes = 0;
  for (const auto* tensors : {&c.inputs, &c.outputs})
    for (const Tensor& t : *tensors)
      if (t) bytes += t.bytes();
  return bytes > 0 && bytes < kAlone ? 1 : threads;
}

}  // namespace

Stream::Stream(Device& device, int threads) : WorkQueue(device), threads_(threads) {
  start_workers(1, [this] { loop(); });
}

void Stream::loop() {
  device_.backend().enter(device_);
  const bool on_cpu = device_.is_cpu();
  std::unique_lock lock(mutex_);
  while (true) {
    if (on_cpu && queue_.empty()) {
      lock.unlock();
      HostPool::set_team_active(false);
      lock.lock();
    }
    wake_.wait(lock, [&] { return !halted_ && !queue_.empty(); });
    Entry entry;
    take(queue_.begin(), entry);
    lock.unlock();
    set_team_size(team_for(entry.command, threads()));
    if (on_cpu) HostPool::set_team_active(team_size() > 1);
    run(entry);
    lock.lock();
  }
}

}  // namespace uniflow
