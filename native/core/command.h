/// A unit of work on a device, its cancellation, and the sessions that queue it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "native/core/backend.h"
#include "native/core/tensor.h"

namespace uniflow {

/// Checked by long kernels between chunks of work; set once, never cleared.
class CancelToken {
 public:
  void cancel() { cancelled_.store(true, std::memory_order_relaxed); }
  bool cancelled() const { return cancelled_.load(std::memory_order_relaxed); }
  void throw_if_cancelled() const {
    if (cancelled()) throw Error(ErrorCode::Aborted, "the work was aborted");
  }

 private:
  std::atomic<bool> cancelled_{false};
};

/// Context of a running command: the device's kernels, and whether to stop.
struct Run {
  Backend& backend;
  const Kernels& kernels;
  const CancelToken& token;
};

struct Command {
  const char* op = "";
  std::vector<Tensor> inputs;   // a failed input fails this command
  std::vector<Tensor> outputs;  // allocated before `run`, failed if it throws
  std::function<void(const Run&)> run;
  /// Called when the command has ended, with null or its failure, on one of the device's threads.
  std::function<void(std::shared_ptr<const Error>)> done = nullptr;
  /// Host pool only: the command is CPU-bound (host_pool.h).
  bool computes = false;
};

/// One user of the devices (a JavaScript environment). Its queued work can be cancelled and waited for.
class Session {
 public:
  /// The token of commands enqueued from now on.
  void set_token(std::shared_ptr<CancelToken> token) { token_ = std::move(token); }

  /// The device for tensors that are not made from other tensors; null: the CPU.
  void set_device(Device* device) { device_ = device; }
  Device& device() const;

  /// Cancels everything it has queued anywhere and returns when none of its work is left. Work enqueued later is cancelled as well.
  void close();

 private:
  friend class WorkQueue;
  void ended();

  Device* device_ = nullptr;
  std::shared_ptr<CancelToken> token_ = std::make_shared<CancelToken>();
  std::atomic<bool> closed_{false};
  std::mutex mutex_;
  std::condition_variable drained_;
  int64_t pending_ = 0;  // guarded by mutex_
};

}  // namespace uniflow
