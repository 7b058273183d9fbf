/// A device's ordered work queue, run by a thread of its own.
///
/// Calls enqueue and return at once. Commands run strictly in order, so an op may use tensors that earlier commands have yet to fill. A
/// failed command marks its outputs; commands that depend on them fail with the same error, and the stream continues. On a GPU, running a
/// command means submitting it to the device, which executes it asynchronously; only `Command::done` waits for the device.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
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
  /// Side stream only: the command is CPU-bound. While the CPU team is active, it runs such commands in batches between the commands of its
  /// own stream. A separate worker would take a core from one team member and make all the others wait.
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

  /// Cancels everything it has queued on any stream and returns when none of its work is left. Work enqueued later is cancelled as well.
  void close();

 private:
  friend class Stream;
  void ended();

  Device* device_ = nullptr;
  std::shared_ptr<CancelToken> token_ = std::make_shared<CancelToken>();
  std::atomic<bool> closed_{false};
  std::mutex mutex_;
  std::condition_variable drained_;
  int64_t pending_ = 0;  // guarded by mutex_
};

class Stream {
 public:
  /// Must outlive every session. With `workers` above 1, up to that many threads (as the system grants) take commands, which then run in no
  /// particular order.
  Stream(Device& device, int threads, int workers = 1);

  /// The host's side work (decoding and resizing images), which must not wait behind a long computation. It has one worker per core; while
  /// the CPU team is active, the team runs CPU-bound commands instead.
  static Stream& side();
  /// Null before the first call of side().
  static Stream* opened_side();

  /// Throws Error(BadInput) if a tensor is on another device.
  void enqueue(const std::shared_ptr<Session>& session, Command command);

  /// Stops starting commands, and returns when none is running. For process exit.
  void halt();

  /// Team size for the commands that follow.
  void set_threads(int threads) { threads_.store(threads); }
  int threads() const { return threads_.load(); }

 private:
  friend class Session;
  using Clock = std::chrono::steady_clock;
  struct Entry {
    Command command;
    std::shared_ptr<Session> session;
    std::shared_ptr<CancelToken> token;
    Clock::time_point since;
  };

  void loop();
  std::shared_ptr<const Error> execute(Entry& entry);
  /// Removes the entry from running_ and notifies its waiters.
  void finish(Entry& entry, std::shared_ptr<const Error> failure);
  /// The first queued command that a worker may start now, or the end.
  std::deque<Entry>::iterator next();
  std::deque<Entry>::iterator wait_for_next(std::unique_lock<std::mutex>& lock);
  /// Side stream only, called on the CPU stream's thread: runs the CPU-bound commands on the team if they would keep it busy or have waited
  /// long enough.
  void share();
  /// Side stream only: makes the workers check the queue again.
  void wake_workers();
  /// CPU stream only: announces whether the next command uses several threads.
  void take_cores(bool take);
  void drop(const Session& session);

  Device& device_;
  std::mutex mutex_;
  std::condition_variable wake_, idle_;
  bool halted_ = false;  // guarded by mutex_
  std::deque<Entry> queue_;
  std::vector<const Entry*> running_;  // guarded by mutex_
  std::atomic<int> threads_;
  std::atomic<bool> by_team_{false};  // CPU stream only: several threads are at work, or about to be
};

}  // namespace uniflow
