/// The CUDA backend is a separate shared library, opened when a GPU is first requested, so the addon loads without a driver and without
/// CUDA.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "native/core/device.h"

namespace uniflow::cuda {

/// Opens "cuda:0". Throws Error(Unsupported) with the reason if it is unavailable.
std::unique_ptr<Backend> open_device(const std::string& name);

/// Every GPU, usable or not; if there is none, one entry named "cuda" with the reason.
std::vector<Device::Status> list_devices();

/// The library's interface, looked up by kLibrarySymbol. The version covers the structures shared by both sides.
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
