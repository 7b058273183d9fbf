#include "native/core/stream.h"

#include <omp.h>

#include <new>
#include <string>
#include <system_error>

#include "native/core/device.h"

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

std::shared_ptr<const Error> aborted() { return std::make_shared<const Error>(ErrorCode::Aborted, "the work was aborted"); }

}  // namespace

int default_threads() { return omp_get_max_threads(); }

Device& Session::device() const { return device_ ? *device_ : Device::cpu(); }

void Session::close() {
  closed_.store(true);
  for (Device* device : Device::opened()) device->stream().drop(*this);
  if (Stream* side = Stream::opened_side()) side->drop(*this);
  std::unique_lock lock(mutex_);
  drained_.wait(lock, [&] { return pending_ == 0; });
}

void Session::ended() {
  std::lock_guard lock(mutex_);
  if (--pending_ == 0) drained_.notify_all();
}

Stream::Stream(Device& device, int threads, int workers) : device_(device), threads_(threads) {
  running_.reserve(static_cast<size_t>(workers));
  for (int i = 0; i < workers; ++i) {
    try {
      std::thread([this] { loop(); }).detach();
    } catch (const std::system_error& e) {
      if (i == 0) throw Error(ErrorCode::OutOfMemory, std::string("no thread can be started: ") + e.what());
      break;
    }
  }
}

namespace {
std::atomic<Stream*> the_side{nullptr};
}

Stream& Stream::side() {
  static Stream& instance = [&]() -> Stream& {
    the_side = new Stream(Device::cpu(), 1, default_threads());  // never destroyed, as Device::cpu()
    return *the_side;
  }();
  return instance;
}

Stream* Stream::opened_side() { return the_side; }

void Stream::enqueue(const std::shared_ptr<Session>& session, Command command) {
  for (const auto* tensors : {&command.inputs, &command.outputs})
    for (const Tensor& t : *tensors)
      if (t && &t.device() != &device_)
        throw Error(ErrorCode::BadInput, command.op, "tensors on one device, " + device_.name(), "one on " + t.device().name());
  {
    std::lock_guard lock(session->mutex_);
    ++session->pending_;
  }
  std::lock_guard lock(mutex_);
  if (session->closed_.load()) session->token_->cancel();
  queue_.push_back({std::move(command), session, session->token_});
  wake_.notify_one();
}

void Stream::halt() {
  std::unique_lock lock(mutex_);
  halted_ = true;
  idle_.wait(lock, [&] { return running_.empty(); });
}

void Stream::drop(const Session& session) {
  std::unique_lock lock(mutex_);
  std::deque<Entry> dropped;  // taken out of the queue: they may wait behind much work of other sessions
  for (auto it = queue_.begin(); it != queue_.end();) {
    if (it->session.get() == &session) {
      dropped.push_back(std::move(*it));
      it = queue_.erase(it);
    } else {
      ++it;
    }
  }
  for (const Entry* entry : running_)
    if (entry->session.get() == &session) entry->token->cancel();
  lock.unlock();
  for (Entry& e : dropped) {
    if (e.command.done) e.command.done(aborted());
    e.session->ended();
  }
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
      c.run({device_.backend(), device_.kernels(), *entry.token});
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
  device_.backend().enter(device_);
  std::unique_lock lock(mutex_);
  int team = 0;
  while (true) {
    wake_.wait(lock, [&] { return !halted_ && !queue_.empty(); });
    Entry entry = std::move(queue_.front());
    queue_.pop_front();
    running_.push_back(&entry);
    lock.unlock();
    if (int want = team_for(entry.command, threads()); want != team) omp_set_num_threads(team = want);
    auto failure = execute(entry);
    lock.lock();
    std::erase(running_, &entry);
    idle_.notify_all();
    lock.unlock();
    auto done = std::move(entry.command.done);
    const auto session = std::move(entry.session);
    entry = {};  // drops the tensors before anyone is told that the command ended
    if (done) {
      device_.backend().after([=](std::shared_ptr<const Error> late) {
        done(failure ? failure : late);
        session->ended();
      });
    } else {
      session->ended();
    }
    lock.lock();
  }
}

}  // namespace uniflow
