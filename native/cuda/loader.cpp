#include "native/cuda/loader.h"

#include <dlfcn.h>

#include <cstdlib>

namespace uniflow::cuda {
namespace {

struct Opened {
  const Library* library = nullptr;
  std::string why;  // why there is none
};

const Library* entry_of(void* handle) {
  auto* entry = reinterpret_cast<const Library* (*)()>(dlsym(handle, kLibrarySymbol));
  return entry ? entry() : nullptr;
}

/// Beside the addon, or the path in the environment.
std::string default_path() {
  if (const char* path = std::getenv("UNIFLOW_CUDA_LIBRARY"); path && *path) return path;
  Dl_info here;
  if (!dladdr(reinterpret_cast<void*>(&default_path), &here) || !here.dli_fname) return "";
  const std::string addon = here.dli_fname;
  return addon.substr(0, addon.rfind('/') + 1) + "libuniflow_cuda.so";
}

Opened open_library() {
  if (const Library* linked = entry_of(RTLD_DEFAULT)) return {linked, ""};  // uniflow_gpu_check is linked with it
  const std::string path = default_path();
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
  if (!handle) {
    const char* why = dlerror();
    return {nullptr, "this build has no CUDA backend (built without nvcc; see README, 'GPU'): " + std::string(why ? why : path)};
  }
  const Library* library = entry_of(handle);
  if (!library || library->version != kLibraryVersion) return {nullptr, path + " belongs to another version of this package: build again"};
  return {library, ""};
}

const Opened& opened() {
  static const Opened* once = new Opened(open_library());
  return *once;
}

[[noreturn]] void unavailable(const std::string& name, const std::string& why) {
  throw Error(ErrorCode::Unsupported, "device: '" + name + "' is not available: " + why);
}

}  // namespace

std::unique_ptr<Backend> open_device(const std::string& name) {
  const std::string digits = name.rfind("cuda:", 0) == 0 ? name.substr(5) : "";
  if (digits.empty() || digits.size() > 4 || digits.find_first_not_of("0123456789") != std::string::npos)
    throw Error(ErrorCode::BadInput, "device", "'auto', 'cpu', 'cuda' or 'cuda:N'", "'" + name + "'");
  if (!opened().library) unavailable(name, opened().why);
  std::string why;
  const int index = std::stoi(digits), count = opened().library->count(why);
  if (count <= 0) unavailable(name, why);
  if (index >= count) unavailable(name, "this machine has cuda:0 to cuda:" + std::to_string(count - 1));
  return opened().library->open(index);
}

std::vector<Device::Status> list_devices() {
  if (!opened().library) return {{"cuda", false, opened().why}};
  std::string why;
  const int count = opened().library->count(why);
  if (count <= 0) return {{"cuda", false, why}};
  std::vector<Device::Status> devices;
  for (int i = 0; i < count; ++i) {
    const std::string name = "cuda:" + std::to_string(i);
    try {
      devices.push_back({name, true, opened().library->describe(i)});
    } catch (const Error& e) {
      devices.push_back({name, false, e.what()});
    }
  }
  return devices;
}

}  // namespace uniflow::cuda
