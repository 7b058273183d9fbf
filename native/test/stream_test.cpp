/// The ordered queue: order, failures and what depends on them, sessions, cancellation, and the life of tensors.
#include "native/core/host_pool.h"
#include "native/core/stream.h"

#include <atomic>
#include <chrono>
#include <new>
#include <thread>

#include "native/core/team.h"
#include "native/test/check.h"

namespace uniflow::test {
namespace {

using Failure = std::shared_ptr<const Error>;
using Work = std::function<void(const Run&)>;

Tensor tensor() { return Tensor(DType::Int32, {1}); }

/// Queues a command and returns how it ended.
std::future<Failure> enqueue(WorkQueue& queue, const SessionRef& s, const char* op, std::vector<Tensor> inputs, std::vector<Tensor> outputs, Work run,
                             bool computes = false) {
  auto ended = std::make_shared<std::promise<Failure>>();
  auto future = ended->get_future();
  queue.enqueue(s, {op, std::move(inputs), std::move(outputs), std::move(run), [ended](Failure f) { ended->set_value(std::move(f)); }, computes});
  return future;
}

std::future<Failure> enqueue(const SessionRef& s, const char* op, std::vector<Tensor> inputs, std::vector<Tensor> outputs, Work run) {
  return enqueue(Device::cpu().stream(), s, op, std::move(inputs), std::move(outputs), std::move(run));
}

Work nothing() { return [](const Run&) {}; }

/// Holds a queue's thread until it is opened.
class Gate {
 public:
  explicit Gate(const SessionRef& s, WorkQueue& queue = Device::cpu().stream()) {
    done_ = enqueue(queue, s, "gate", {}, {}, [this](const Run&) {
      entered_.set_value();
      open_.get_future().wait();
    });
    entered_.get_future().wait();
  }
  ~Gate() { open(); }
  void open() {
    if (opened_) return;
    opened_ = true;
    open_.set_value();
    done_.wait();
  }

 private:
  std::promise<void> entered_, open_;
  std::future<Failure> done_;
  bool opened_ = false;
};

bool is(const Failure& f, ErrorCode code, const std::string& op) { return f && f->code == code && f->op == op; }

void test_order() {
  const auto s = session();
  const Tensor t = tensor();
  std::vector<int> seen;
  std::thread::id thread;
  bool one_thread = true;
  for (int i = 0; i < 100; ++i)
    enqueue(s, "step", {}, {t}, [&, i](const Run&) {
      if (i == 0) thread = std::this_thread::get_id();
      one_thread &= std::this_thread::get_id() == thread;
      *t.data<int32_t>() = i == 0 ? 0 : *t.data<int32_t>() + i;
      seen.push_back(i);
    });
  wait(t);
  bool ordered = seen.size() == 100;
  for (size_t i = 0; i < seen.size(); ++i) ordered &= seen[i] == static_cast<int>(i);
  check(ordered, "commands run in the order of their calls");
  check(one_thread && thread != std::this_thread::get_id(), "all on one thread, which is not the caller's");
  check(*t.data<int32_t>() == 4950, "a command sees what the earlier ones wrote");
}

void test_failures() {
  const auto s = session();
  const Tensor a = tensor(), b = tensor(), c = tensor(), d = tensor();
  bool ran = false;
  auto bad = enqueue(s, "first", {}, {a}, [](const Run&) { throw Error(ErrorCode::BadInput, "x", "one", "two"); });
  auto child = enqueue(s, "second", {a}, {b}, [&](const Run&) { ran = true; });
  auto grandchild = enqueue(s, "third", {d, b}, {c}, nothing());
  auto stranger = enqueue(s, "fourth", {}, {d}, nothing());
  const Failure why = bad.get();
  check(is(why, ErrorCode::BadInput, "first") && why->subject == "x" && why->expected == "one" && why->actual == "two", "a failure names its op and keeps its parts");
  check(child.get() == why && !ran, "what depends on it does not run, and fails with the same error");
  check(grandchild.get() == why, "and so on");
  check(!stranger.get(), "what does not depend on it succeeds");
  check(wait(c) == why && !wait(d), "tensors keep how they ended");

  auto memory = enqueue(s, "greedy", {}, {tensor()}, [](const Run&) { throw std::bad_alloc(); });
  auto other = enqueue(s, "odd", {}, {tensor()}, [](const Run&) { throw std::runtime_error("surprise"); });
  check(is(memory.get(), ErrorCode::OutOfMemory, "greedy"), "std::bad_alloc is OUT_OF_MEMORY");
  const Failure internal = other.get();
  check(is(internal, ErrorCode::Internal, "odd") && std::string(internal->what()) == "surprise", "any other exception is INTERNAL");
  const Tensor huge(DType::UInt8, {int64_t{1} << 50});
  check(is(enqueue(s, "huge", {}, {huge}, nothing()).get(), ErrorCode::OutOfMemory, "huge"), "an output that does not fit is OUT_OF_MEMORY");
  check(is(wait(huge), ErrorCode::OutOfMemory, "huge"), "and so is what depends on it");
}

void test_done() {
  const auto s = session();
  int calls = 0;
  bool after = false, ran = false;
  Failure seen = std::make_shared<Error>(ErrorCode::Internal, "not called");
  Device::cpu().stream().enqueue(s, {"op", {}, {}, [&](const Run&) { ran = true; }, [&](Failure f) {
                              ++calls;
                              after = ran;
                              seen = f;
                            }});
  wait(tensor());
  check(calls == 1 && after && !seen, "done is called once, after the command, with nothing where it succeeded");
}

void test_tokens() {
  const auto s = session();
  auto first = std::make_shared<CancelToken>(), second = std::make_shared<CancelToken>();
  std::future<Failure> a, b;
  {
    Gate gate(s);
    s->set_token(first);
    a = enqueue(s, "a", {}, {}, nothing());
    s->set_token(second);
    b = enqueue(s, "b", {}, {}, nothing());
    first->cancel();
  }
  check(is(a.get(), ErrorCode::Aborted, "a"), "a command carries the token that was set when it was queued");
  check(!b.get(), "and no other");
  std::promise<void> begun;
  auto running = enqueue(s, "long", {}, {}, [&](const Run& run) {
    const CancelToken& token = run.token;
    begun.set_value();
    while (true) token.throw_if_cancelled();
  });
  begun.get_future().wait();
  second->cancel();
  check(is(running.get(), ErrorCode::Aborted, "long"), "a command that runs sees its token cancelled");
}

/// Ends with ABORTED once its token is cancelled, with INTERNAL if that takes seconds.
Work stubborn(std::promise<void>& begun) {
  return [&begun](const Run& run) {
    const CancelToken& token = run.token;
    begun.set_value();
    for (int i = 0; i < 3000; ++i) {
      token.throw_if_cancelled();
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    throw Error(ErrorCode::Internal, "nobody cancelled it");
  };
}

void test_close() {
  const auto mine = session(), theirs = session();
  std::promise<void> begun;
  int done = 0;
  auto count = [&](Failure f) { done += f && f->code == ErrorCode::Aborted; };
  Device::cpu().stream().enqueue(mine, {"running", {}, {}, stubborn(begun), count});
  for (int i = 0; i < 10; ++i) Device::cpu().stream().enqueue(mine, {"queued", {}, {}, nothing(), count});
  auto other = enqueue(theirs, "theirs", {}, {}, nothing());
  begun.get_future().wait();
  mine->close();
  check(done == 11, "close cancels what runs and what is queued, and returns when all of it has ended", std::to_string(done) + " of 11 ended with ABORTED");
  check(!other.get(), "another session's work is untouched");
  check(is(enqueue(mine, "late", {}, {}, nothing()).get(), ErrorCode::Aborted, "late"), "what a closed session queues is aborted");
  mine->close();
  session()->close();
  check(true, "closing twice, or without any work, returns");
}

/// The command that runs carries an earlier token than the session's present one.
void test_close_earlier_token() {
  const auto s = session();
  std::promise<void> begun;
  Failure why;
  s->set_token(std::make_shared<CancelToken>());
  Device::cpu().stream().enqueue(s, {"running", {}, {}, stubborn(begun), [&](Failure f) { why = f; }});
  begun.get_future().wait();
  s->set_token(std::make_shared<CancelToken>());
  s->close();
  check(is(why, ErrorCode::Aborted, "running"), "close cancels what runs, whatever token was set since", why ? why->what() : "no failure");
  s->set_token(std::make_shared<CancelToken>());
  check(is(enqueue(s, "late", {}, {}, nothing()).get(), ErrorCode::Aborted, "late"), "a new token does not open a closed session");
}

/// Many threads, a session each: every thread's commands stay in order, and none is lost.
void test_many_threads() {
  constexpr int kThreads = 8, kCommands = 300;
  std::atomic<int> ended{0}, disordered{0}, aborted{0};
  int64_t unguarded = 0;  // written by the stream's thread only
  std::vector<std::thread> threads;
  for (int n = 0; n < kThreads; ++n)
    threads.emplace_back([&, n] {
      const auto s = session();
      auto token = std::make_shared<CancelToken>();
      s->set_token(token);
      auto next = std::make_shared<int>(0);
      Tensor last = tensor();
      for (int i = 0; i < kCommands; ++i) {
        const Tensor out = tensor();
        Device::cpu().stream().enqueue(s, {"step", {i ? last : Tensor()}, {out}, [&, i, next](const Run&) {
                                    disordered += (*next)++ != i;
                                    ++unguarded;
                                  }, [&](Failure f) {
                                    ++ended;
                                    aborted += f && f->code == ErrorCode::Aborted;
                                  }});
        last = out;  // the one before is dropped while it is queued
        if (n % 4 == 3 && i == kCommands / 2) token->cancel();
      }
      wait(last);
      s->close();
    });
  for (std::thread& t : threads) t.join();
  check(ended == kThreads * kCommands, "eight threads at once: every command ends");
  check(disordered == 0, "each thread's in its order");
  check(unguarded + aborted == kThreads * kCommands, "and runs, or is aborted", std::to_string(aborted) + " aborted");
}

void test_tensors() {
  const auto s = session();
  wait(tensor());  // and whatever else is still to be dropped
  const int64_t before = Device::cpu().memory().stats().active;
  std::weak_ptr<Buffer> buffer;
  int64_t inside = 0;
  std::future<Failure> used;
  {
    Gate gate(s);
    Tensor a(DType::UInt8, {1 << 20});
    buffer = a.buffer();
    enqueue(s, "fill", {}, {a}, [&](const Run&) { inside = Device::cpu().memory().stats().active - before; });
    used = enqueue(s, "use", {a}, {}, nothing());
    check(Device::cpu().memory().stats().active == before, "a tensor has no memory before its command runs");
    a = {};
    check(!buffer.expired(), "a tensor dropped while it is queued lives on");
  }
  used.wait();
  s->close();
  check(inside == 1 << 20, "its memory is there when its command runs", std::to_string(inside));
  check(buffer.expired() && Device::cpu().memory().stats().active == before, "and is gone when close returns");
}

/// Every worker of the host pool holds a command of the session that closes.
void test_close_while_several_run() {
  const auto closing = session(), other = session();
  std::atomic<int> running{0}, stopped{0};
  std::vector<std::future<Failure>> ended;
  for (int i = 0; i < 2 * default_threads(); ++i)
    ended.push_back(enqueue(HostPool::instance(), closing, "long", {}, {}, [&](const Run& run) {
      ++running;
      while (!run.token.cancelled()) std::this_thread::yield();
      ++stopped;
      run.token.throw_if_cancelled();
    }));
  while (running < default_threads()) std::this_thread::yield();
  closing->close();
  bool aborted = true;
  for (auto& e : ended) aborted &= e.get()->code == ErrorCode::Aborted;
  check(aborted && stopped == default_threads(), "close stops what runs on each worker, and drops the rest");
  check(!enqueue(HostPool::instance(), other, "after", {}, {}, nothing()).get(), "and leaves the workers to other sessions");
}

void test_streams() {
  const auto a = session(), b = session();
  Gate gate(a);
  auto side = enqueue(HostPool::instance(), b, "side", {}, {}, nothing());
  check(side.wait_for(std::chrono::seconds(10)) == std::future_status::ready, "the host pool does not wait for the CPU's");
  gate.open();
  if (default_threads() > 1) {
    Gate one(a, HostPool::instance());
    auto other = enqueue(HostPool::instance(), b, "other", {}, {}, nothing());
    check(other.wait_for(std::chrono::seconds(10)) == std::future_status::ready, "the host's commands do not wait for each other");
  }
  const int threads = Device::cpu().stream().threads();
  int inside = 0;
  Device::cpu().stream().set_threads(threads + 3);
  enqueue(a, "count", {}, {}, [&](const Run&) { inside = team_size(); }).wait();
  Device::cpu().stream().set_threads(threads);
  check(inside == threads + 3, "set_threads holds for the commands that follow");
}

/// CPU-bound work of the host pool runs on the CPU's team while it is active, on the workers otherwise, and after some time in any case.
void test_sharing() {
  const auto a = session(), b = session();
  const int team = Device::cpu().stream().threads();
  Gate gate(a);
  std::atomic<int> by_team{0}, ended{0};
  int before_next = 0;
  const auto compute = [&](const Run&) {
    by_team += in_region();
    ++ended;
  };
  std::vector<std::future<Failure>> all;
  for (int i = 0; i < 2 * team; ++i) all.push_back(enqueue(HostPool::instance(), b, "compute", {}, {}, compute, true));
  auto next = enqueue(a, "next", {}, {}, [&](const Run&) { before_next = ended; });
  check(!enqueue(HostPool::instance(), b, "read", {}, {}, nothing()).get() && ended == 0, "what only reads goes first, by a worker");
  gate.open();
  next.wait();
  for (auto& f : all) check(!f.get(), "shared work ends well");
  check(before_next == 2 * team && (team == 1 || by_team == 2 * team), "the team does it before its next command");

  by_team = 0;
  check(!enqueue(HostPool::instance(), b, "alone", {}, {}, compute, true).get() && by_team == 0, "a worker does it where the CPU has nothing to do");
  Gate long_one(a);
  check(!enqueue(HostPool::instance(), b, "patient", {}, {}, compute, true).get() && by_team == 0, "and where a command takes long");

  const auto closing = session();
  auto dropped = enqueue(HostPool::instance(), closing, "dropped", {}, {}, compute, true);
  closing->close();
  check(dropped.get()->code == ErrorCode::Aborted, "close drops it as any other");
}

}  // namespace
}  // namespace uniflow::test

int main() {
  using namespace uniflow::test;
  test_order();
  test_failures();
  test_done();
  test_tokens();
  test_close();
  test_close_earlier_token();
  test_close_while_several_run();
  test_many_threads();
  test_tensors();
  test_streams();
  test_sharing();
  return finish();
}
