/// The GPU's kernels, with the names of native/ops/kernels.h; the files have the stems of native/cpu.
#pragma once

#include "native/ops/kernels.h"

namespace uniflow::cuda {

/// The table of all kernels.
const Kernels& kernels();

UNIFLOW_KERNELS(UNIFLOW_DECLARATION)
UNIFLOW_COMMON_KERNELS(UNIFLOW_DECLARATION)

}  // namespace uniflow::cuda
