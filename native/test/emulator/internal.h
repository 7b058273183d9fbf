/// What the parts of the emulator share.
#pragma once

#include "native/test/emulator/cuda.h"

namespace emulator {

/// Runs the work now; or records it, where the stream is being captured.
cudaError_t submit(cudaStream_t stream, std::function<void()> work);

/// What fresh memory is filled with: 0xcb, large negative numbers, and 0xff, NaN, in turn.
unsigned char garbage(uint64_t turn);

/// Runs all blocks of a grid. One grid at a time: other threads of the host wait.
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread_body);

}  // namespace emulator
