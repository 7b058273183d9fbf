#include "native/core/work_queue.h"

#include <algorithm>
#include <new>
#include <string>
#include <system_error>
#include <thread>

#include "native/core/device.h"
#include "native/core/host_pool.h"

namespace uniflow {
namespace {

std::shared_ptr<const Error> aborted() { return std::make_shared<const Error>(ErrorCode::Aborted, "the work was aborted"); }

}  // namespace

Device& Session::device() const { return device_ ? *device_ : Device::cpu(); }

void Session::close() {
  closed_.store(true);
  if (std::lock_guard lock(mutex_); pending_ == 0) return;  // no device may have been opened
  for (Device* device : Device::opened()) device->stream().drop(*this);
  if (HostPool* pool = HostPool::opened()) pool->drop(*this);
  std::unique_lock lock(mutex_);
  drained_.wait(lock, [&] { return pending_ == 0; });
}

void Session::ended() {
  std::lock_guard lock(mutex_);
  if (--pending_ == 0) drained_.notify_all();
}

void WorkQueue::start_workers(int count, const std::function<void()>& loop) {
  {
    std::lock_guard lock(mutex_);
    running_.reserve(static_cast<size_t>(count));
  }
  for (int i = 0; i < count; ++i) {
    try {
      std::thread(loop).detach();
    } catch (const std::system_error& e) {
      if (i == 0) throw Error(ErrorCode::OutOfMemory, std::string("no thread can be started: ") + e.what());
      break;
    }
  }
}

void WorkQueue::enqueue(const std::shared_ptr<Session>& session, Command command) {
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
  queue_.push_back({std::move(command), session, session->token_, Clock::now()});
  wake_.notify_one();
}

void WorkQueue::halt() {
  std::unique_lock lock(mutex_);
  halted_ = true;
  idle_.wait(lock, [&] { return running_.empty(); });
}

void WorkQueue::drop(const Session& session) {
  std::unique_lock lock(mutex_);
  std::deque<Entry> dropped;  // removed from the queue: they could wait behind much work of other sessions
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

void WorkQueue::take(std::deque<Entry>::iterator chosen, Entry& entry) {
  entry = std::move(*chosen);
  queue_.erase(chosen);
  running_.push_back(&entry);
}

std::shared_ptr<const Error> WorkQueue::execute(Entry& entry) {
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

void WorkQueue::finish(Entry& entry, std::shared_ptr<const Error> failure) {
  {
    std::lock_guard lock(mutex_);
    std::erase(running_, &entry);
    idle_.notify_all();
  }
  auto done = std::move(entry.command.done);
  const auto session = std::move(entry.session);
  entry = {};  // release the tensors before anyone learns that the command ended
  if (done) {
    device_.backend().after([=](std::shared_ptr<const Error> late) {
      done(failure ? failure : late);
      session->ended();
    });
  } else {
    session->ended();
  }
}

}  // namespace uniflow
