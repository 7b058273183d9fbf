/// The team of threads: every item once, whoever runs it; what runs alone; helpers that are late, gone or asleep.
#include "native/core/parallel.h"

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <thread>

#include "native/test/check.h"

namespace uniflow::test {
namespace {

using namespace std::chrono_literals;

/// The exit status of `body()` in a child process.
template <class Body>
int in_child(Body&& body) {
  const pid_t child = fork();
  if (child == 0) _exit(body());
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/// Result of default_threads() with these variables; 255 if it refuses them.
int threads_with(const char* own, const char* openmp) {
  return in_child([&] {
    for (auto [name, value] : {std::pair("UNIFLOW_THREADS", own), std::pair("OMP_NUM_THREADS", openmp)})
      if (value) setenv(name, value, 1);
      else unsetenv(name);
    try {
      return default_threads();
    } catch (const Error& e) {
      return e.code == ErrorCode::BadInput ? 255 : 254;
    }
  });
}

void test_default_threads() {
  const int cores = threads_with(nullptr, nullptr);
  check(cores >= 1 && cores <= std::max(1, static_cast<int>(std::thread::hardware_concurrency())), "by default the cores of this process");
  check(threads_with(nullptr, "3") == 3 && threads_with(nullptr, "5,2") == 5, "OMP_NUM_THREADS says how many, a list by its first number");
  check(threads_with("4", "3") == 4, "UNIFLOW_THREADS before it");
  check(threads_with("", "") == cores, "empty is not set");
  bool refused = true;
  for (const char* bad : {"0", "-1", "two", "2x", "1025", "99999999999"}) refused &= threads_with(bad, nullptr) == 255 && threads_with(nullptr, bad) == 255;
  check(refused, "anything else is refused");
}

/// Whether a loop over n runs each i once, on no more threads at once than the team has.
bool once_each(int64_t n, bool dynamic) {
  std::vector<std::atomic<int>> times(static_cast<size_t>(n));
  std::atomic<int> at_once{0}, most{0};
  parallel_for(n, [&](int64_t i) {
    const int now = ++at_once;
    for (int seen = most; seen < now && !most.compare_exchange_weak(seen, now);) {
    }
    ++times[static_cast<size_t>(i)];
    --at_once;
  }, dynamic);
  return most <= team_size() && std::ranges::all_of(times, [](const auto& t) { return t == 1; });
}

void test_every_item() {
  bool ok = true;
  for (int threads : {1, 2, 3, 8, 2, 1, 5}) {
    set_team_size(threads);
    for (int64_t n : {0, 1, 2, 3, 7, 8, 9, 1000, 65537}) ok &= once_each(n, false) && once_each(n, true);
  }
  check(ok, "each item runs once, in teams of 1 to 8");
  int64_t covered = 0;
  set_team_size(1);
  parallel_chunks(100'000, [&](int64_t begin, int64_t end) { covered += end - begin; });
  check(covered == 100'000, "chunks cover the range");
}

void test_nested() {
  set_team_size(3);
  std::atomic<int> inner{0}, alone{0};
  check(!in_region() && team_size() == 3, "outside of regions the team has the size that was set");
  parallel_for(6, [&](int64_t) {
    const auto self = std::this_thread::get_id();
    alone += in_region() && team_size() == 1;
    parallel_for(10, [&](int64_t) { inner += std::this_thread::get_id() == self; });
  });
  check(inner == 60 && alone == 6, "a loop inside another runs on its thread alone");
  check(!in_region() && team_size() == 3, "and so it is afterwards");
}

/// Two threads use the team at the same time: one of them runs alone, both finish.
void test_two_callers() {
  std::atomic<int64_t> total{0};
  const auto caller = [&] {
    set_team_size(3);
    for (int64_t round = 0; round < 3000; ++round)
      parallel_for(round % 11, [&](int64_t i) { total += i; }, round % 2 == 0);
  };
  std::thread other(caller);
  caller();
  other.join();
  int64_t want = 0;
  for (int64_t round = 0; round < 3000; ++round) want += (round % 11) * (round % 11 - 1) / 2;
  check(total == 2 * want, "two threads that compute at the same time");
}

/// A helper that is held up keeps its one item; all others are run meanwhile.
void test_late_helper() {
  set_team_size(2);
  const auto caller = std::this_thread::get_id();
  for (bool dynamic : {true, false}) {
    std::atomic<int> others{0};
    std::atomic<bool> held{false};
    bool met = true;
    for (int attempt = 0; attempt < 100 && !held; ++attempt) {
      others = 0;
      parallel_for(dynamic ? 50 : 2, [&](int64_t) {
        if (std::this_thread::get_id() == caller || held.exchange(true)) {
          std::this_thread::sleep_for(100us);  // gives the helper time to come
          ++others;
          return;
        }
        const auto end = std::chrono::steady_clock::now() + 20s;
        while (others < (dynamic ? 49 : 1) && std::chrono::steady_clock::now() < end) std::this_thread::yield();
        met = others == (dynamic ? 49 : 1);
      }, dynamic);
    }
    check(held && met, std::string("a late helper holds up nothing but its own part, ") + (dynamic ? "dynamic" : "static"));
  }
}

void test_fork() {
  set_team_size(3);
  once_each(100, true);
  const int status = in_child([] { return once_each(1000, false) && once_each(1000, true) ? 0 : 1; });
  check(status == 0, "a forked process, which has no helpers, computes as well");
}

double cpu_seconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) + 1e-6 * static_cast<double>(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
}

void test_sleep() {
  set_team_size(4);
  once_each(100, true);
  std::this_thread::sleep_for(50ms);
  const double before = cpu_seconds();
  std::this_thread::sleep_for(500ms);
  const double used = cpu_seconds() - before;
  check(used < 0.05, "helpers sleep where there is nothing to do", text("%.3f s of the processor in half a second", used));
  check(once_each(1000, false), "and wake up again");
}

}  // namespace
}  // namespace uniflow::test

int main() {
  using namespace uniflow::test;
  test_default_threads();
  test_every_item();
  test_nested();
  test_two_callers();
  test_late_helper();
  test_fork();
  test_sleep();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
