#include "native/core/team.h"

#ifdef __linux__
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <charconv>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>

#include "native/core/error.h"

namespace uniflow {
namespace {

thread_local int the_size = 0;  // 0: unset
thread_local bool inside = false;

int cores() {
#ifdef __linux__
  cpu_set_t set;  // up to 1024 cores; larger machines return EINVAL
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

int read_default_threads() {
  for (const char* name : {"UNIFLOW_THREADS", "OMP_NUM_THREADS"}) {
    const char* value = std::getenv(name);
    if (!value || !*value) continue;
    std::string_view text = value;
    text = text.substr(0, text.find(','));  // OpenMP's variable may be a list, one number per nesting level
    int threads = 0;
    const char* const last = text.data() + text.size();
    const auto [end, error] = std::from_chars(text.data(), last, threads);
    if (error != std::errc() || end != last || threads < 1 || threads > kMostThreads)
      throw Error(ErrorCode::BadInput, name, "a number of threads from 1 to " + std::to_string(kMostThreads), value);
    return threads;
  }
  return std::min(cores(), kMostThreads);
}

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

/// Waits briefly for `done()` before sleeping; returns whether it became true. Regions follow each other within microseconds, and waking
/// takes tens of them. After some spins it yields the core: on a busy machine the thread it waits for may need it.
template <class Done>
bool soon(Done done) {
  constexpr int kSpins = 1000;
  constexpr std::chrono::microseconds kYielding{300};
  for (int i = 0; i < kSpins; ++i) {
    if (done()) return true;
    pause();
  }
  const auto end = std::chrono::steady_clock::now() + kYielding;
  do {
    if (done()) return true;
    std::this_thread::yield();
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

class Team {
 public:
  /// Never destroyed: its threads run until the process ends.
  static Team& instance() {
    static Team* team = new Team;
    return *team;
  }

  /// Returns false if another thread is using the team.
  bool run(int members, int64_t n, Schedule schedule, RegionBody body) {
    if (in_use_.exchange(true, std::memory_order_acquire)) return false;
    grow(members);
    ++region_;
    members_ = members;
    n_ = n;
    schedule_ = schedule;
    body_ = body;
    next_.store(0, std::memory_order_relaxed);
    call_helpers(members - 1);
    work(0);
    dismiss_helpers();
    in_use_.store(false, std::memory_order_release);
    return true;
  }

 private:
  /// `places_` is kSeat times the helpers that may still join, plus kCallerSleeps, plus the helpers that have joined. Only those that have
  /// joined may read the region.
  static constexpr uint32_t kSeat = 1 << 16, kCallerSleeps = 1 << 15;

  void call_helpers(int seats) {
    places_.store(static_cast<uint32_t>(seats) * kSeat, std::memory_order_release);
    calls_.fetch_add(1);
    const int asleep = asleep_.load();
    if (asleep <= seats) {
      if (asleep > 0) calls_.notify_all();
    } else {
      for (int i = 0; i < seats; ++i) calls_.notify_one();
    }
  }

  /// Closes the region to new helpers and waits for those still running a part.
  void dismiss_helpers() {
    places_.fetch_and(kSeat - 1, std::memory_order_relaxed);
    if (soon([&] { return places_.load(std::memory_order_acquire) == 0; })) return;
    places_.fetch_or(kCallerSleeps, std::memory_order_relaxed);
    for (uint32_t places; (places = places_.load(std::memory_order_acquire)) != kCallerSleeps;) places_.wait(places);
  }

  bool join() {
    uint32_t places = places_.load(std::memory_order_relaxed);
    while (places >= kSeat)
      if (places_.compare_exchange_weak(places, places - kSeat + 1, std::memory_order_acquire, std::memory_order_relaxed)) return true;
    return false;
  }

  void leave() {
    if (places_.fetch_sub(1, std::memory_order_release) == (kCallerSleeps | 1)) places_.notify_one();
  }

  void help(int index) {
    inside = true;  // everything on this thread is part of a region
    uint32_t seen = 0;
    const auto called = [&] { return calls_.load(std::memory_order_relaxed) != seen; };
    while (true) {
      if (!soon(called)) {
        ++asleep_;
        while (!called()) calls_.wait(seen);
        --asleep_;
      }
      seen = calls_.load(std::memory_order_acquire);
      if (!join()) continue;
      work(index);
      leave();
    }
  }

  /// Runs parts that nobody else has started, beginning with the part that `member` had in the previous region.
  void work(int member) {
    if (schedule_ == Schedule::Dynamic) {
      for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < n_;) body_.run(body_.body, i, i + 1);
      return;
    }
    for (int i = 0; i < members_; ++i) {
      const int64_t part = (member + i) % members_;
      std::atomic<uint64_t>& owner = owners_[static_cast<size_t>(part)];
      if (owner.load(std::memory_order_relaxed) == region_ || owner.exchange(region_, std::memory_order_relaxed) == region_) continue;
      body_.run(body_.body, n_ * part / members_, n_ * (part + 1) / members_);
    }
  }

  /// If the system grants no more threads, the team has fewer helpers.
  void grow(int members) {
    if (members <= most_members_) return;
    most_members_ = members;
    owners_ = std::make_unique<std::atomic<uint64_t>[]>(static_cast<size_t>(members));
    try {
      for (; helpers_ < members - 1; ++helpers_) std::thread([this, index = helpers_ + 1] { help(index); }).detach();
    } catch (const std::system_error&) {
    }
  }

  std::atomic<bool> in_use_{false};
  int helpers_ = 0, most_members_ = 0;

  // the region
  uint64_t region_ = 0;
  int members_ = 0;
  int64_t n_ = 0;
  Schedule schedule_ = Schedule::Static;
  RegionBody body_{};
  std::unique_ptr<std::atomic<uint64_t>[]> owners_;  // for each part, the last region in which it was taken

  alignas(64) std::atomic<int64_t> next_{0};     // Dynamic only
  alignas(64) std::atomic<uint32_t> calls_{0};   // counts regions; helpers sleep on it
  alignas(64) std::atomic<uint32_t> places_{0};  // see kSeat; the caller sleeps on it
  alignas(64) std::atomic<int> asleep_{0};
};

}  // namespace

int default_threads() {
  static const int threads = read_default_threads();
  return threads;
}

int team_size() {
  if (inside) return 1;
  return the_size > 0 ? the_size : the_size = default_threads();
}

void set_team_size(int threads) { the_size = std::clamp(threads, 1, kMostThreads); }

bool in_region() { return inside; }

void run_region(int64_t n, Schedule schedule, RegionBody body) {
  if (n <= 0) return;
  const int members = static_cast<int>(std::min<int64_t>(team_size(), n));
  const bool outer = inside;
  inside = true;
  if (members == 1 || !Team::instance().run(members, n, schedule, body)) body.run(body.body, 0, n);
  inside = outer;
}

}  // namespace uniflow
