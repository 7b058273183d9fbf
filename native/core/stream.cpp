#include "native/core/stream.h"

#include <algorithm>
#include <iterator>
#include <new>
#include <string>
#include <system_error>

#include "native/core/device.h"
#include "native/core/parallel.h"

namespace uniflow {
namespace {

/// Commands that touch fewer bytes than this run on the stream's own thread. They would finish before a team has assembled, and on a busy
/// machine they would wait for its slowest member.
constexpr int64_t kAlone = 256 << 10;

/// The team takes side-stream commands when there are kEachAtOnce for each member, so that all members finish at about the same time. After
/// kFew it accepts fewer. After kPatience, for example behind a long command, a worker takes a command even while the team is active.
constexpr int64_t kEachAtOnce = 2;
constexpr std::chrono::milliseconds kFew{1}, kPatience{100};

int team_for(const Command& c, int threads) {
  int64_t bytes = 0;
  for (const auto* tensors : {&c.inputs, &c.outputs})
    for (const Tensor& t : *tensors)
      if (t) bytes += t.bytes();
  return bytes > 0 && bytes < kAlone ? 1 : threads;
}

std::shared_ptr<const Error> aborted() { return std::make_shared<const Error>(ErrorCode::Aborted, "the work was aborted"); }

}  // namespace

Device& Session::device() const { return device_ ? *device_ : Device::cpu(); }

void Session::close() {
  closed_.store(true);
  if (std::lock_guard lock(mutex_); pending_ == 0) return;  // no device may have been opened
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
    the_side = new Stream(Device::cpu(), 1, default_threads());  // never destroyed, like Device::cpu()
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
  queue_.push_back({std::move(command), session, session->token_, Clock::now()});
  wake_.notify_one();
}

void Stream::halt() {
  std::unique_lock lock(mutex_);
  halted_ = true;
  idle_.wait(lock, [&] { return running_.empty(); });
}

void Stream::drop(const Session& session) {
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

void Stream::finish(Entry& entry, std::shared_ptr<const Error> failure) {
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

std::deque<Stream::Entry>::iterator Stream::next() {
  if (this != opened_side() || !Device::cpu().stream().by_team_) return queue_.begin();
  const auto now = Clock::now();
  return std::ranges::find_if(queue_, [&](const Entry& e) { return !e.command.computes || now - e.since >= kPatience; });
}

std::deque<Stream::Entry>::iterator Stream::wait_for_next(std::unique_lock<std::mutex>& lock) {
  while (true) {
    if (!halted_)
      if (const auto found = next(); found != queue_.end()) return found;
    if (halted_ || queue_.empty()) wake_.wait(lock);
    else wake_.wait_until(lock, queue_.front().since + kPatience);
  }
}

void Stream::share() {
  std::vector<Entry> taken;
  {
    std::lock_guard lock(mutex_);
    const auto computes = [](const Entry& e) { return e.command.computes; };
    const auto first = std::ranges::find_if(queue_, computes);
    if (halted_ || first == queue_.end()) return;
    const bool enough = std::ranges::count_if(queue_, computes) >= kEachAtOnce * team_size();
    if (!enough && Clock::now() - first->since < kFew) return;
    const auto rest = std::stable_partition(queue_.begin(), queue_.end(), [&](const Entry& e) { return !computes(e); });
    taken.assign(std::make_move_iterator(rest), std::make_move_iterator(queue_.end()));
    queue_.erase(rest, queue_.end());
    for (const Entry& entry : taken) running_.push_back(&entry);
  }
  const auto run = [&](int64_t i) { finish(taken[static_cast<size_t>(i)], execute(taken[static_cast<size_t>(i)])); };
  parallel_for(static_cast<int64_t>(taken.size()), run, /*dynamic=*/true);
}

void Stream::wake_workers() {
  std::lock_guard lock(mutex_);  // every worker that has checked the queue is waiting by now
  if (std::ranges::any_of(queue_, [](const Entry& e) { return e.command.computes; })) wake_.notify_all();
}

void Stream::take_cores(bool take) {
  by_team_ = take;
  Stream* side = opened_side();
  if (!side) return;
  if (take) side->share();
  else side->wake_workers();
}

void Stream::loop() {
  device_.backend().enter(device_);
  std::unique_lock lock(mutex_);
  const bool is_cpu = this == &Device::cpu().stream();
  while (true) {
    if (is_cpu && queue_.empty()) {
      lock.unlock();
      take_cores(false);
      lock.lock();
    }
    const auto chosen = wait_for_next(lock);
    Entry entry = std::move(*chosen);
    queue_.erase(chosen);
    running_.push_back(&entry);
    lock.unlock();
    set_team_size(team_for(entry.command, threads()));
    if (is_cpu) take_cores(team_size() > 1);
    finish(entry, execute(entry));
    lock.lock();
  }
}

}  // namespace uniflow
