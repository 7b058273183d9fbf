/// A block's dynamic shared memory.
#pragma once

namespace uniflow::cuda {

/// 16-byte aligned.
template <class T>
__device__ inline T* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char uniflow_shared[];
  return reinterpret_cast<T*>(uniflow_shared);
}

}  // namespace uniflow::cuda
