/// Libraries opened at run time.
#pragma once

#include <dlfcn.h>

namespace uniflow::cuda {

/// Null with the reason in dlerror() if it cannot be opened.
inline void* open_library(const char* file) { return dlopen(file, RTLD_NOW | RTLD_LOCAL); }
inline void* symbol(void* library, const char* name) { return dlsym(library, name); }

}  // namespace uniflow::cuda
