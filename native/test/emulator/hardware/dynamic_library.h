/// Twin of native/cuda/hardware/dynamic_library.h: every file is the emulator's cuBLASLt.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>

namespace uniflow::cuda {

inline void* open_library(const char*) { return reinterpret_cast<void*>(&emulator::cublaslt_symbol); }
inline void* symbol(void*, const char* name) { return emulator::cublaslt_symbol(name); }

}  // namespace uniflow::cuda
