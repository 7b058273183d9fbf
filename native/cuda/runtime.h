/// The device that a thread feeds: its stream, its memory, its properties. Every thread of the host that calls a kernel of
/// native/cuda has entered a device first (Backend::enter).
#pragma once

#ifdef UNIFLOW_EMULATED
#include "native/test/emulator/cuda.h"
#else
#include <cuda_runtime_api.h>
#endif

#include <functional>
#include <vector>

#include "native/core/tensor.h"

namespace uniflow::cuda {

/// Throws what `status` says, as Error(OutOfMemory) or Error(Internal) naming the call. CUDA's own last error is cleared.
void check(cudaError_t status, const char* call);

/// Where this thread's kernels run.
cudaStream_t stream();

struct Properties {
  int multiprocessors;
  int capability;      // 90: sm_90
  int shared_bytes;    // dynamic shared memory that a block may opt in to
  int64_t l2_bytes;
};
const Properties& properties();

/// Memory of the device for the kernels that are queued next; it returns to the pool with the last reference, in stream order.
Tensor scratch(DType dtype, Shape shape);

/// Work that is recorded once and then launched as one, which spares the gaps between small kernels.
class Graph {
 public:
  /// Records what `work` queues on stream(), without running it. Nothing in it may wait, or move memory from or to the host. What it takes
  /// from scratch() belongs to the graph. Throws what `work` throws.
  explicit Graph(const std::function<void()>& work);
  ~Graph();
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  void launch() const;

 private:
  cudaGraphExec_t executable_ = nullptr;
  std::vector<Tensor> kept_;
};

/// Whether this thread is recording a Graph.
bool recording();

/// `bytes` of the host's memory, copied before this returns, as device memory in stream order: for lists of pointers and the like.
Tensor to_device(const void* host, int64_t bytes);

/// to[0..bytes) of the host = from[0..bytes) of the device, when all that was queued before has run. Waits.
void to_host(void* to, const void* from, int64_t bytes);

}  // namespace uniflow::cuda
