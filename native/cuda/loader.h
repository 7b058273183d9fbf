/// The CUDA backend as a shared library of its own, opened when a GPU is first asked for: the addon needs no driver and no CUDA to load.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "native/core/device.h"

namespace uniflow::cuda {

/// "cuda:0". Throws Error(Unsupported) that says why it cannot be had.
std::unique_ptr<Backend> open_device(const std::string& name);

/// Every GPU, usable or not; one entry named "cuda" with the reason where there is none.
std::vector<Device::Status> list_devices();

/// What the library answers. `find` is looked up by this name; the version is that of the structures that cross the border.
struct Library {
  int version;
  /// Number of devices, or -1 with the reason.
  int (*count)(std::string& why);
  std::string (*describe)(int index);
  std::unique_ptr<Backend> (*open)(int index);  // throws Error
};
constexpr int kLibraryVersion = UNIFLOW_BORDER;  // a hash of the headers that both sides are compiled with
constexpr const char* kLibrarySymbol = "uniflow_cuda_library";

}  // namespace uniflow::cuda
