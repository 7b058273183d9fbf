/// The ordered queue of work of one device, run by one thread of its own.
///
/// Calls enqueue and return at once; commands run strictly in order, so an op may use tensors that
/// earlier commands have yet to fill. A command that fails marks its outputs, whatever depends on
/// them fails with the same error, and the stream goes on.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "native/core/tensor.h"

namespace uniflow {

/// Asked by long kernels between chunks of work; set once, never cleared.
class CancelToken {
 public:
  void cancel() { cancelled_.store(true, std::memory_order_relaxed); }
  bool cancelled() const { return cancelled_.load(std::memory_order_relaxed); }
  void throw_if_cancelled() const;

 private:
  std::atomic<bool> cancelled_{false};
};

struct Command {
  const char* op = "";
  std::vector<Tensor> inputs;   // their failures become this command's
  std::vector<Tensor> outputs;  // allocated before `run`, failed if it throws
  std::function<void(const CancelToken&)> run;
  /// Called after the command ended, with null or with why it failed, on the stream's thread.
  std::function<void(std::shared_ptr<const Error>)> done = nullptr;
};

/// One user of a stream (a JavaScript environment): what it enqueued can be cancelled and waited for.
class Session {
 public:
  /// The token that commands enqueued from now on carry.
  void set_token(std::shared_ptr<CancelToken> token) { token_ = std::move(token); }

 private:
  friend class Stream;
  std::shared_ptr<CancelToken> token_ = std::make_shared<CancelToken>();
  std::atomic<bool> closed_{false};
  int64_t pending_ = 0;  // guarded by the stream's mutex
};

class Stream {
 public:
  /// The CPU's stream: all computing. It starts its thread on first use and outlives every session.
  static Stream& cpu();
  /// A second thread for the host's side work (resizing pictures), which must not wait behind a long computation.
  static Stream& host();

  void enqueue(const std::shared_ptr<Session>& session, Command command);

  /// Drops everything that the session has queued and returns when the command of it that runs, if any, has ended.
  void close(const std::shared_ptr<Session>& session);

  /// Size of the OpenMP team for the commands that follow.
  void set_threads(int threads) { threads_.store(threads); }
  int threads() const { return threads_.load(); }

 private:
  struct Entry {
    Command command;
    std::shared_ptr<Session> session;
    std::shared_ptr<CancelToken> token;
  };

  explicit Stream(int threads);
  void loop();
  static std::shared_ptr<const Error> execute(Entry& entry);

  std::mutex mutex_;
  std::condition_variable wake_, drained_;
  std::deque<Entry> queue_;
  const Entry* running_ = nullptr;  // guarded by mutex_
  std::atomic<int> threads_;
  std::thread thread_;
};

/// Cores that this process may use: the affinity mask, or OMP_NUM_THREADS where set.
int default_threads();

}  // namespace uniflow
