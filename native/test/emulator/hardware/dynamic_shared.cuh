/// Twin of native/cuda/hardware/dynamic_shared.cuh.
#pragma once

#include <cuda_runtime.h>

namespace uniflow::cuda {

template <class T>
T* dynamic_shared() {
  return static_cast<T*>(emulator::dynamic_shared());
}

}  // namespace uniflow::cuda
