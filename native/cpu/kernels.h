/// The CPU's kernels. They are compiled once per instruction set and split their work over the thread team.
#pragma once

#include <string>
#include <vector>

#include "native/ops/kernels.h"

namespace uniflow::cpu {

/// The kernel table for the best instruction set of this machine, or for the one named by the environment variable UNIFLOW_ISA. Throws
/// Error(BadInput) if the machine does not support that one.
const Kernels& kernels();

/// The instruction sets of this machine, best first: avx512bf16, avx512, avx2, portable.
std::vector<std::string> instruction_sets();

}  // namespace uniflow::cpu
