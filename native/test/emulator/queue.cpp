/// The work of streams, and the threads that run it: one per stream, some time after it was submitted, as on a device. Random
/// delays, drawn from the seed, let streams overtake each other, and the host overtake them, unless something orders them.
/// UNIFLOW_EMULATOR_SYNC=1 runs all work immediately in the submitting thread.
///
/// An event is a mark: a queue, and the number of pieces that it has been given before. It has happened once that many have run.
#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <thread>

#include "native/test/emulator/internal.h"

namespace emulator {
namespace {

struct Piece {
  std::function<void()> work;  // none: it only waits
  std::vector<Mark> after;
};

struct Queues {
  std::mutex mutex;  // guards all queues
  std::vector<std::shared_ptr<Queue>> open;
  uint64_t opened = 0;
};

Queues& queues() {
  static Queues& q = *new Queues;  // outlives all threads
  return q;
}

std::atomic<cudaError_t> failed = cudaSuccess;

bool at_once() {
  static const bool set = [] {
    const char* text = std::getenv("UNIFLOW_EMULATOR_SYNC");
    return text && *text && *text != '0';
  }();
  return set;
}

}  // namespace

class Queue : public std::enable_shared_from_this<Queue> {
 public:
  Queue(bool blocking, uint64_t number) : blocking_(blocking), random_{seed() * 0x9e3779b97f4a7c15u + number} {}

  // With the mutex held:
  void give(std::unique_lock<std::mutex>& lock, Piece piece);
  Mark mark() { return {shared_from_this(), given_, clock_}; }
  void wait(std::unique_lock<std::mutex>& lock, uint64_t number) {
    progress_.wait(lock, [&] { return ran_ >= number; });
  }
  bool reached(uint64_t number) const { return ran_ >= number; }
  /// Further dependencies of the next piece, besides those of its queue: the default stream and blocking streams take turns.
  std::vector<Mark> turn();
  void close();

 private:
  void loop();
  void run(std::unique_lock<std::mutex>& lock, Piece piece);
  void dawdle();

  const bool blocking_;
  Random random_;
  std::deque<Piece> pieces_;
  uint64_t given_ = 0, ran_ = 0;
  uint64_t clock_ = 0;  // counts pieces of work, those of streams that were waited for among them: the same in every run
  bool started_ = false, closed_ = false;
  std::condition_variable wake_, progress_;
};

std::vector<Mark> Queue::turn() {
  std::vector<Mark> after;
  for (const auto& other : queues().open) {
    const bool turns = blocking_ && other->blocking_ && other.get() != this && (other == default_queue() || this == default_queue().get());
    if (!turns) continue;
    clock_ = std::max(clock_, other->clock_);
    if (other->ran_ < other->given_) after.push_back(other->mark());
  }
  return after;
}

void Queue::give(std::unique_lock<std::mutex>& lock, Piece piece) {
  ++given_;
  for (const Mark& m : piece.after) clock_ = std::max(clock_, m.clock);
  if (piece.work) ++clock_;
  if (at_once()) return run(lock, std::move(piece));
  pieces_.push_back(std::move(piece));
  if (!std::exchange(started_, true)) std::thread([self = shared_from_this()] { self->loop(); }).detach();
  wake_.notify_one();
}

void Queue::close() {
  closed_ = true;
  wake_.notify_one();
  if (!started_) std::erase(queues().open, shared_from_this());
}

void Queue::loop() {
  std::unique_lock lock(queues().mutex);
  while (true) {
    wake_.wait(lock, [&] { return !pieces_.empty() || closed_; });
    if (pieces_.empty()) break;
    Piece next = std::move(pieces_.front());
    pieces_.pop_front();
    run(lock, std::move(next));
  }
  std::erase(queues().open, shared_from_this());
}

void Queue::run(std::unique_lock<std::mutex>& lock, Piece piece) {
  for (const Mark& m : piece.after) m.queue->wait(lock, m.number);
  if (piece.work) {
    lock.unlock();
    if (!at_once()) dawdle();
    if (failed == cudaSuccess) piece.work();
    piece.work = nullptr;  // with all that it kept, before anyone is told
    lock.lock();
  }
  ++ran_;
  progress_.notify_all();
}

void Queue::dawdle() {
  const uint32_t chance = random_.below(32), microseconds = chance == 0 ? 1000 : chance < 16 ? 1 + random_.below(60) : 0;
  if (microseconds) std::this_thread::sleep_for(std::chrono::microseconds(microseconds));
}

std::shared_ptr<Queue> open_queue(bool blocking) {
  Queues& q = queues();
  std::lock_guard lock(q.mutex);
  q.open.push_back(std::make_shared<Queue>(blocking, ++q.opened));
  return q.open.back();
}

void close_queue(Queue& queue) {
  std::lock_guard lock(queues().mutex);
  queue.close();
}

const std::shared_ptr<Queue>& default_queue() {
  static const auto& queue = *new std::shared_ptr<Queue>(open_queue(true));
  return queue;
}

void append(const std::shared_ptr<Queue>& queue, std::function<void()> work) {
  default_queue();  // there before the mutex is taken
  std::unique_lock lock(queues().mutex);
  queue->give(lock, {std::move(work), queue->turn()});
}

void append_wait(const std::shared_ptr<Queue>& queue, const Mark& mark) {
  if (!mark.queue) return;
  default_queue();
  std::unique_lock lock(queues().mutex);
  Piece piece{nullptr, queue->turn()};
  piece.after.push_back(mark);
  queue->give(lock, std::move(piece));
}

Mark mark(const std::shared_ptr<Queue>& queue) {
  default_queue();
  std::unique_lock lock(queues().mutex);
  if (std::vector<Mark> after = queue->turn(); !after.empty()) queue->give(lock, {nullptr, std::move(after)});
  return queue->mark();
}

bool reached(const Mark& mark) {
  std::lock_guard lock(queues().mutex);
  return !mark.queue || mark.queue->reached(mark.number);
}

void wait_for(const Mark& mark) {
  if (!mark.queue) return;
  std::unique_lock lock(queues().mutex);
  mark.queue->wait(lock, mark.number);
}

void wait_for_all() {
  std::vector<Mark> marks;
  {
    std::lock_guard lock(queues().mutex);
    for (const auto& queue : queues().open) marks.push_back(queue->mark());
  }
  for (const Mark& m : marks) wait_for(m);
}

void fail(cudaError_t status, const char* message) {
  cudaError_t none = cudaSuccess;
  if (failed.compare_exchange_strong(none, status)) std::fprintf(stderr, "CUDA emulator: %s\n", message);
}

cudaError_t failure() { return failed; }

}  // namespace emulator
