/// A device's ordered work queue, run by a thread of its own.
///
/// Commands run strictly in order, so an op may use tensors that earlier commands have yet to fill. On a GPU, running a command means
/// submitting it to the device, which executes it asynchronously; only `Command::done` waits for the device.
#pragma once

#include <atomic>

#include "native/core/work_queue.h"

namespace uniflow {

class Stream : public WorkQueue {
 public:
  /// Must outlive every session.
  Stream(Device& device, int threads);

  /// Team size for the commands that follow.
  void set_threads(int threads) { threads_.store(threads); }
  int threads() const { return threads_.load(); }

 private:
  void loop();

  std::atomic<int> threads_;
};

}  // namespace uniflow
