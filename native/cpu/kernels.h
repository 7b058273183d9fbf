/// The CPU's kernels. Those of one instruction set are compiled once for each, and split their work over the team of threads.
#pragma once

#include "native/ops/kernels.h"

namespace uniflow::cpu {

/// The table for this machine: the best instruction set that it has, or the one that the environment
/// variable UNIFLOW_ISA names (avx512bf16, avx512, avx2, portable), if the machine has it.
const Kernels& kernels();

}  // namespace uniflow::cpu
