/// The CPU's kernels. Those of one instruction set are compiled once for each, and split their work over the team of threads.
#pragma once

#include <string>
#include <vector>

#include "native/ops/kernels.h"

namespace uniflow::cpu {

/// The table for this machine: of the best instruction set that it has, or of the one that the environment variable UNIFLOW_ISA
/// names. Throws Error(BadInput) where the machine has none of that name.
const Kernels& kernels();

/// Those that this machine has, the best first: avx512bf16, avx512, avx2, portable.
std::vector<std::string> instruction_sets();

}  // namespace uniflow::cpu
