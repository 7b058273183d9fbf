/// The host's side work (decoding and resizing images), which must not wait behind a long computation. Commands run in no particular order.
///
/// The pool has one worker per core. While the CPU's team is active, it runs CPU-bound commands of the pool in batches between the commands of
/// its own stream: a worker would take a core from one team member and make all the others wait.
#pragma once

#include "native/core/work_queue.h"

namespace uniflow {

class HostPool : public WorkQueue {
 public:
  static HostPool& instance();
  /// Null before the first call of instance().
  static HostPool* opened();

  /// Called on the thread of the CPU's stream: before each command, whether it uses several threads, and with false when there is none left.
  static void set_team_active(bool active);

 private:
  explicit HostPool(int workers);

  void loop();
  /// The first queued command that a worker may start now, or the end.
  std::deque<Entry>::iterator next();
  std::deque<Entry>::iterator wait_for_next(std::unique_lock<std::mutex>& lock);
  /// Runs the CPU-bound commands on the team if they would keep it busy or have waited long enough.
  void run_on_team();
  /// Makes the workers check the queue again.
  void wake_workers();
};

}  // namespace uniflow
