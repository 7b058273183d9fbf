/// The device that a thread feeds: its stream, memory and properties. Every host thread that calls a kernel of native/cuda must have
/// entered a device before (Backend::enter).
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <vector>

#include "native/core/tensor.h"

namespace uniflow::cuda {

/// Throws `status` as Error(OutOfMemory) or Error(Internal) with the name of the call. Clears CUDA's last error.
void check(cudaError_t status, const char* call);

/// The stream of this thread's kernels.
cudaStream_t stream();

struct Properties {
  int multiprocessors;
  int capability;      // 90 means sm_90
  int shared_bytes;    // dynamic shared memory that a block may opt in to
  int64_t l2_bytes;
};
const Properties& properties();

/// Device memory for the kernels queued next; it returns to the pool with the last reference, in stream order.
Tensor scratch(DType dtype, Shape shape);

/// Work that is recorded once and then launched as a unit, which avoids the gaps between small kernels.
class Graph {
 public:
  /// Records the work that `work` queues on stream(), without running it. It must not wait, or copy between host and device. Memory from
  /// scratch() belongs to the graph. Throws what `work` throws.
  explicit Graph(const std::function<void()>& work);
  ~Graph();
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  void launch() const;

 private:
  int device_;  // the thread that destroys the graph may have chosen another, or none
  cudaGraphExec_t executable_ = nullptr;
  std::vector<Tensor> kept_;
};

/// Whether this thread is recording a Graph.
bool recording();

/// Device memory with a copy of `bytes` of host memory, made before this returns, in stream order; for lists of pointers and the like.
Tensor to_device(const void* host, int64_t bytes);

/// Copies from[0..bytes) on the device to to[0..bytes) on the host after all work queued before. Waits.
void to_host(void* to, const void* from, int64_t bytes);

}  // namespace uniflow::cuda
