/// Chooses the kernels for this machine, once.
#include <cstdlib>
#include <cstring>

#include "native/cpu/flow.h"
#include "native/cpu/kernels.h"
#include "native/cpu/quality.h"

namespace uniflow::cpu {

#ifdef UNIFLOW_X86
namespace avx512bf16 { extern const Kernels table; }
namespace avx512 { extern const Kernels table; }
namespace avx2 { extern const Kernels table; }
#endif
namespace portable { extern const Kernels table; }

namespace {

struct Choice {
  const Kernels* table;
  bool supported;
};

const Kernels& choose() {
  const Choice choices[] = {
#ifdef UNIFLOW_X86
      {&avx512bf16::table, __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")},
      {&avx512::table, __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")},
      {&avx2::table, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {&portable::table, true},
  };
  const char* wanted = std::getenv("UNIFLOW_ISA");
  for (const Choice& c : choices)
    if (c.supported && (!wanted || std::strcmp(wanted, c.table->name) == 0)) return *c.table;
  for (const Choice& c : choices)
    if (c.supported) return *c.table;
  return portable::table;
}

/// The chosen table, with what does not depend on the instruction set.
Kernels complete() {
  Kernels k = choose();
  k.flow_integrate = flow_integrate;
  k.flow_velocity = flow_velocity;
  k.time_waves = time_waves;
  k.image_quality = image_quality;
  return k;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels chosen = complete();
  return chosen;
}

}  // namespace uniflow::cpu
