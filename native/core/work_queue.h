/// Queued and running commands: the common part of a device's ordered stream and of the host's pool.
///
/// Calls enqueue and return at once. A failed command marks its outputs; commands that depend on them fail with the same error, and the queue
/// continues.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "native/core/command.h"

namespace uniflow {

class WorkQueue {
 public:
  WorkQueue(const WorkQueue&) = delete;

  /// Throws Error(BadInput) if a tensor is on another device.
  void enqueue(const std::shared_ptr<Session>& session, Command command);

  /// Stops starting commands, and returns when none is running. For process exit.
  void halt();

 protected:
  using Clock = std::chrono::steady_clock;
  struct Entry {
    Command command;
    std::shared_ptr<Session> session;
    std::shared_ptr<CancelToken> token;
    Clock::time_point since;
  };

  explicit WorkQueue(Device& device) : device_(device) {}
  ~WorkQueue() = default;

  /// Starts up to `count` threads, as the system grants. Throws Error(OutOfMemory) if it grants none.
  void start_workers(int count, const std::function<void()>& loop);
  /// Moves a command from the queue into `entry`, which counts as running from now on. The caller holds mutex_.
  void take(std::deque<Entry>::iterator chosen, Entry& entry);
  /// Runs a command taken from the queue.
  void run(Entry& entry) { finish(entry, execute(entry)); }

  Device& device_;
  std::mutex mutex_;
  std::condition_variable wake_, idle_;
  bool halted_ = false;                // guarded by mutex_
  std::deque<Entry> queue_;            // guarded by mutex_
  std::vector<const Entry*> running_;  // guarded by mutex_

 private:
  friend class Session;
  std::shared_ptr<const Error> execute(Entry& entry);
  /// Removes the entry from running_ and notifies its waiters.
  void finish(Entry& entry, std::shared_ptr<const Error> failure);
  void drop(const Session& session);
};

}  // namespace uniflow
