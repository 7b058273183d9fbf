/// The threads that compute: one team for the process. A region is a loop whose parts the team's members take; the caller is the
/// first member and the others help.
///
/// A region never depends on its helpers: whatever part none of them has begun, the caller runs. So a helper that sleeps, that
/// another program holds up, or that a fork has left behind delays nothing but the part it is at. In return no body may wait for
/// another. Helpers look for work for a moment and then sleep.
#pragma once

#include <cstdint>

namespace uniflow {

/// The most threads that a team can have.
constexpr int kMostThreads = 1024;

/// Cores that this process may use, or UNIFLOW_THREADS, or else OMP_NUM_THREADS, where set; Error(BadInput) for anything but a number there.
int default_threads();

/// Members that the next region of the calling thread may have, itself included: 1 inside a region.
int team_size();
/// Sets it for the calling thread, from default_threads().
void set_team_size(int threads);
/// Whether the calling thread runs the body of a region.
bool in_region();

/// Runs body(begin, end) on parts of [0, n).
struct RegionBody {
  void (*run)(const void* body, int64_t begin, int64_t end);
  const void* body;
};

/// Static gives each member one part, the same one in the next region of this size; Dynamic gives items one by one, for uneven work.
enum class Schedule { Static, Dynamic };

/// Returns when the body has run for all of [0, n), which it does on the calling thread alone inside another region, where the team
/// has one member, and while another thread uses the team. The body must not throw.
void run_region(int64_t n, Schedule schedule, RegionBody body);

}  // namespace uniflow
