/// Twin of native/cuda/hardware/sizes.h: small, so that small tests cross them.
#pragma once

#include <cstdint>

#include "native/core/dtype.h"

namespace uniflow::cuda {

constexpr int64_t kMostElements = 1 << 16;
constexpr int64_t kChunkBytes = 64 << 10;
constexpr float kPeakMs = 0.001f;
constexpr int64_t peak_size(DType) { return 64; }

}  // namespace uniflow::cuda
