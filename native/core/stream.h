/// The ordered queue of work of one device, run by one thread of its own.
///
/// Calls enqueue and return at once; commands run strictly in order, so an op may use tensors that
/// earlier commands have yet to fill. A command that fails marks its outputs, whatever depends on
/// them fails with the same error, and the stream goes on. On a GPU, a command that "runs" is given to the device, which works
/// behind; only what somebody waits for (`Command::done`) waits for the device.
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

/// Asked by long kernels between chunks of work; set once, never cleared.
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

/// What a command runs with: the device's kernels, and whether it should stop.
struct Run {
  Backend& backend;
  const Kernels& kernels;
  const CancelToken& token;
};

struct Command {
  const char* op = "";
  std::vector<Tensor> inputs;   // their failures become this command's
  std::vector<Tensor> outputs;  // allocated before `run`, failed if it throws
  std::function<void(const Run&)> run;
  /// Called after the command ended, with null or with why it failed, on a thread of the device.
  std::function<void(std::shared_ptr<const Error>)> done = nullptr;
  /// Of the side stream: it needs a core all the time. While a team of the CPU's is at work, it runs these, several at a time, between two
  /// commands of its stream: a worker that takes a core from a member of the team makes all the others wait.
  bool computes = false;
};

/// One user of the devices (a JavaScript environment): what it enqueued can be cancelled and waited for.
class Session {
 public:
  /// The token that commands enqueued from now on carry.
  void set_token(std::shared_ptr<CancelToken> token) { token_ = std::move(token); }

  /// Where tensors that are made from no other tensor are made; null: the CPU.
  void set_device(Device* device) { device_ = device; }
  Device& device() const;

  /// Cancels what it has queued on any stream and returns when none of its work is left. What it enqueues later is cancelled too.
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
  /// It outlives every session. `workers` above 1: so many threads take commands, or as many as the system grants; they then run in no order.
  Stream(Device& device, int threads, int workers = 1);

  /// The host's side work (decoding and resizing pictures), which must not wait behind a long computation: a worker for each core,
  /// and the CPU's team, where that is at work.
  static Stream& side();
  /// Null before the first call of side().
  static Stream* opened_side();

  /// Throws Error(BadInput) where a tensor is on another device.
  void enqueue(const std::shared_ptr<Session>& session, Command command);

  /// Returns when no command runs; none is begun any more. For the end of the process.
  void halt();

  /// Size of the team for the commands that follow.
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
  /// Takes it out of running_, and tells who waits.
  void finish(Entry& entry, std::shared_ptr<const Error> failure);
  /// The first in the queue that one of its workers may begin, or the end.
  std::deque<Entry>::iterator next();
  std::deque<Entry>::iterator wait_for_next(std::unique_lock<std::mutex>& lock);
  /// Of the side stream, on the CPU's thread: runs with the team what computes, if that is enough to keep it busy, or has waited for some time.
  void share();
  /// Of the side stream: has the workers look again.
  void wake_workers();
  /// Of the CPU's stream: whether several threads take part in its next command.
  void take_cores(bool take);
  void drop(const Session& session);

  Device& device_;
  std::mutex mutex_;
  std::condition_variable wake_, idle_;
  bool halted_ = false;  // guarded by mutex_
  std::deque<Entry> queue_;
  std::vector<const Entry*> running_;  // guarded by mutex_
  std::atomic<int> threads_;
  std::atomic<bool> by_team_{false};  // of the CPU's stream: several threads are at work, or about to be
};

}  // namespace uniflow
