/// The compute threads: one team per process. A region is a loop whose parts are taken by the team's members; the caller is the first
/// member and the others are helpers.
///
/// A region never depends on its helpers: the caller runs every part that none of them has started. A helper that sleeps, is preempted, or
/// did not survive a fork delays at most the part it is running. In return, a body must not wait for another one. Helpers look for work
/// briefly and then sleep.
#pragma once

#include <cstdint>

namespace uniflow {

/// The largest possible team.
constexpr int kMostThreads = 1024;

/// UNIFLOW_THREADS if set, else OMP_NUM_THREADS, else the number of cores available to this process. Throws Error(BadInput) if the variable
/// is not a number.
int default_threads();

/// Number of members that the calling thread's next region may have, including itself: 1 inside a region.
int team_size();
/// Sets it for the calling thread; the default is default_threads().
void set_team_size(int threads);
/// Whether the calling thread is running the body of a region.
bool in_region();

/// A callback body(begin, end) for parts of [0, n).
struct RegionBody {
  void (*run)(const void* body, int64_t begin, int64_t end);
  const void* body;
};

/// Static gives each member one part, the same one in the next region of this size. Dynamic hands out single items, for uneven work.
enum class Schedule { Static, Dynamic };

/// Returns when the body has run for all of [0, n). It runs entirely on the calling thread inside another region, if the team has one
/// member, or while another thread uses the team. The body must not throw.
void run_region(int64_t n, Schedule schedule, RegionBody body);

}  // namespace uniflow
