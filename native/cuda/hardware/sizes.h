/// Sizes that suit a GPU.
#pragma once

#include <cstdint>

#include "native/core/dtype.h"

namespace uniflow::cuda {

/// Larger operands of products are multiplied in parts: many of cuBLASLt's kernels count elements in 32 bits.
constexpr int64_t kMostElements = (int64_t{1} << 31) - 1;

/// Size of a download's chunks.
constexpr int64_t kChunkBytes = int64_t{32} << 20;

/// For how long the peak is measured (the first quarter of the products warms up), and the side of its matrices.
constexpr float kPeakMs = 400;
constexpr int64_t peak_size(DType dtype) { return dtype == DType::Float32 ? 4096 : 8192; }

}  // namespace uniflow::cuda
