#include "native/core/stream.h"

#include <omp.h>

#include <new>

namespace uniflow {
namespace {

/// A command that touches fewer bytes than this is done before a team of threads has come together, and would wait for the slowest of
/// them where the machine is busy: it runs on the stream's own thread.
constexpr int64_t kAlone = 256 << 10;

int team_for(const Command& c, int threads) {
  int64_t bytes = 0;
  for (const auto* tensors : {&c.inputs, &c.outputs})
    for (const Tensor& t : *tensors)
      if (t) bytes += t.bytes();
  return bytes > 0 && bytes < kAlone ? 1 : threads;
}

}  // namespace

void CancelToken::throw_if_cancelled() const {
  if (cancelled()) throw Error(ErrorCode::Aborted, "the work was aborted");
}

int default_threads() { return omp_get_max_threads(); }

Stream::Stream(int threads) : threads_(threads) {
  thread_ = std::thread([this] { loop(); });
  thread_.detach();
}

Stream& Stream::cpu() {
  // Never destroyed: its thread may still wait when static destructors run. Sessions are what is
  // closed in order; with none left, the thread sleeps and touches nothing.
  static Stream* instance = new Stream(default_threads());
  return *instance;
}

Stream& Stream::host() {
  static Stream* instance = new Stream(1);
  return *instance;
}

void Stream::enqueue(const std::shared_ptr<Session>& session, Command command) {
  std::lock_guard lock(mutex_);
  ++session->pending_;
  if (session->closed_.load()) session->token_->cancel();
  queue_.push_back({std::move(command), session, session->token_});
  wake_.notify_one();
}

void Stream::close(const std::shared_ptr<Session>& session) {
  session->closed_.store(true);
  std::unique_lock lock(mutex_);
  std::deque<Entry> dropped;  // taken out of the queue: they may wait behind much work of other sessions
  for (auto it = queue_.begin(); it != queue_.end();) {
    if (it->session == session) {
      dropped.push_back(std::move(*it));
      it = queue_.erase(it);
    } else {
      ++it;
    }
  }
  session->pending_ -= static_cast<int64_t>(dropped.size());
  if (running_ && running_->session == session) running_->token->cancel();
  lock.unlock();
  const auto aborted = std::make_shared<const Error>(ErrorCode::Aborted, "the work was aborted");
  for (Entry& e : dropped)
    if (e.command.done) e.command.done(aborted);
  dropped.clear();
  lock.lock();
  drained_.wait(lock, [&] { return session->pending_ == 0; });
}

std::shared_ptr<const Error> Stream::execute(Entry& entry) {
  Command& c = entry.command;
  std::shared_ptr<const Error> failure;
  for (const Tensor& t : c.inputs)
    if (t && t.buffer()->failure) failure = t.buffer()->failure;
  if (!failure) {
    try {
      entry.token->throw_if_cancelled();
      for (Tensor& t : c.outputs) t.buffer()->allocate();
      c.run(*entry.token);
    } catch (const Error& e) {
      failure = std::make_shared<Error>(e.in_op(c.op));
    } catch (const std::bad_alloc&) {
      failure = std::make_shared<Error>(Error(ErrorCode::OutOfMemory, "out of host memory").in_op(c.op));
    } catch (const std::exception& e) {
      failure = std::make_shared<Error>(Error(ErrorCode::Internal, e.what()).in_op(c.op));
    }
  }
  if (failure)
    for (Tensor& t : c.outputs) t.buffer()->failure = failure;
  return failure;
}

void Stream::loop() {
  std::unique_lock lock(mutex_);
  int team = 0;
  while (true) {
    wake_.wait(lock, [&] { return !queue_.empty(); });
    Entry entry = std::move(queue_.front());
    queue_.pop_front();
    running_ = &entry;
    lock.unlock();
    if (int want = team_for(entry.command, threads()); want != team) omp_set_num_threads(team = want);
    auto failure = execute(entry);
    lock.lock();
    running_ = nullptr;
    lock.unlock();
    const auto done = std::move(entry.command.done);
    const auto session = std::move(entry.session);
    entry = {};  // drops the tensors before anyone is told that the command ended
    if (done) done(std::move(failure));
    lock.lock();
    if (--session->pending_ == 0) drained_.notify_all();
  }
}

}  // namespace uniflow
