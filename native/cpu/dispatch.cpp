/// Chooses this machine's kernels, once.
#include <cstdlib>
#include <cstring>

#include "native/core/error.h"
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

/// The tables that this machine supports, best first.
std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> tables;
#ifdef UNIFLOW_X86
  if (__builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw")) {
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) tables.push_back(&avx512bf16::table);
    tables.push_back(&avx512::table);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) tables.push_back(&avx2::table);
#endif
  tables.push_back(&portable::table);
  return tables;
}

const Kernels& choose() {
  const auto tables = supported();
  const char* wanted = std::getenv("UNIFLOW_ISA");
  if (!wanted || !*wanted) return *tables[0];
  std::string names;
  for (const Kernels* table : tables) {
    if (std::strcmp(wanted, table->name) == 0) return *table;
    names += (names.empty() ? "" : ", ") + std::string(table->name);
  }
  throw Error(ErrorCode::BadInput, "UNIFLOW_ISA", "an instruction set of this machine (" + names + ")", wanted);
}

/// The chosen table, completed with the kernels that do not depend on the instruction set.
Kernels complete() {
  Kernels k = choose();
  k.flow_integrate = flow_integrate;
  k.flow_velocity = flow_velocity;
  k.timestep_embedding = timestep_embedding;
  k.image_quality = image_quality;
  return k;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels chosen = complete();
  return chosen;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* table : supported()) names.emplace_back(table->name);
  return names;
}

}  // namespace uniflow::cpu
