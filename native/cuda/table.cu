/// The GPU's kernel table, and the entry point of the library.
#include "native/cuda/backend.h"
#include "native/cuda/kernels.h"
#include "native/cuda/loader.h"

namespace uniflow::cuda {

const Kernels& kernels() {
  static const Kernels table = {
      .name = "CUDA",
      .native_bfloat16 = true,
      UNIFLOW_KERNELS(UNIFLOW_ENTRY)
      UNIFLOW_COMMON_KERNELS(UNIFLOW_ENTRY)
  };
  return table;
}

const Kernels& CudaBackend::kernels() const { return cuda::kernels(); }

}  // namespace uniflow::cuda

/// Looked up by loader.cpp.
extern "C" [[gnu::visibility("default")]] const uniflow::cuda::Library* uniflow_cuda_library() {
  static const uniflow::cuda::Library library = {uniflow::cuda::kLibraryVersion, uniflow::cuda::device_count, uniflow::cuda::describe, uniflow::cuda::open};
  return &library;
}
