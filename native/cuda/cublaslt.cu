/// Locates cuBLASLt and its functions. Nothing here runs on the device.
#include "native/cuda/cublaslt.h"

#include <dynamic_library.h>
#include <glob.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <sstream>
#include <vector>

#include "native/cuda/runtime.h"

namespace uniflow::cuda {
namespace {

struct Opened {
  lt::Library library{};
  std::string why;  // why it cannot be used
};

/// Fills in the functions; returns the name of a missing one, or "".
template <class Find>
std::string bind(lt::Library& library, Find&& find) {
  std::string missing;
  auto bind_one = [&]<class Function>(Function*& function, const char* name) {
    function = reinterpret_cast<Function*>(find(name));
    if (!function) missing = name;
  };
  bind_one(library.create, "cublasLtCreate");
  bind_one(library.get_version, "cublasLtGetVersion");
  bind_one(library.operation_create, "cublasLtMatmulDescCreate");
  bind_one(library.operation_destroy, "cublasLtMatmulDescDestroy");
  bind_one(library.operation_set, "cublasLtMatmulDescSetAttribute");
  bind_one(library.layout_create, "cublasLtMatrixLayoutCreate");
  bind_one(library.layout_destroy, "cublasLtMatrixLayoutDestroy");
  bind_one(library.preference_create, "cublasLtMatmulPreferenceCreate");
  bind_one(library.preference_destroy, "cublasLtMatmulPreferenceDestroy");
  bind_one(library.preference_set, "cublasLtMatmulPreferenceSetAttribute");
  bind_one(library.heuristic, "cublasLtMatmulAlgoGetHeuristic");
  bind_one(library.matmul, "cublasLtMatmul");
  return missing;
}

/// Files that match a shell pattern, newer versions (12.10) before older ones (12.9).
std::vector<std::string> matches(const std::string& pattern) {
  std::vector<std::string> found;
  glob_t g{};
  if (glob(pattern.c_str(), GLOB_BRACE, nullptr, &g) == 0) found.assign(g.gl_pathv, g.gl_pathv + g.gl_pathc);
  globfree(&g);
  std::ranges::sort(found, [](const std::string& a, const std::string& b) { return strverscmp(a.c_str(), b.c_str()) > 0; });
  return found;
}

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

/// The locations of the library below a prefix: conda's own package, and NVIDIA's wheels as Python's installers place them.
std::string below(const std::string& prefix) {
  return prefix + "/lib/{,python3*/{site,dist}-packages/nvidia/{cu13,cublas}/lib/}libcublasLt.so.1[23]";
}

/// The prefixes of the programs on the PATH: an environment whose python is found there may be anywhere, and need not be activated.
std::vector<std::string> prefixes_on_path() {
  std::vector<std::string> prefixes;
  std::istringstream path(variable("PATH"));
  for (std::string folder; std::getline(path, folder, ':');) {
    while (folder.size() > 1 && folder.back() == '/') folder.pop_back();
    if (folder.ends_with("/bin")) prefixes.push_back(folder.substr(0, folder.size() - 4));
  }
  return prefixes;
}

/// Names, paths and patterns, in the order of the attempts.
std::vector<std::string> places() {
  std::vector<std::string> all;
  auto add = [&](const std::string& place) {
    if (std::ranges::find(all, place) == all.end()) all.push_back(place);
  };
  if (const std::string path = variable("UNIFLOW_CUBLASLT"); !path.empty()) add(path);
  for (const char* place : {"libcublasLt.so.13", "libcublasLt.so.12", "/usr/local/cuda*/lib64/libcublasLt.so.1[23]"}) add(place);
  for (const char* name : {"VIRTUAL_ENV", "CONDA_PREFIX"})
    if (const std::string prefix = variable(name); !prefix.empty()) add(below(prefix));
  for (const std::string& prefix : prefixes_on_path()) add(below(prefix));
  if (const std::string home = variable("HOME"); !home.empty()) add(below(home + "/.local"));
  for (const char* prefix : {"/usr/local", "/usr", "/opt", "/opt/*"}) add(below(prefix));
  return all;
}

bool is_pattern(const std::string& place) { return place.find_first_of("*{[") != std::string::npos; }

constexpr size_t kOldest = 120000;  // cublasLtGetVersion() of CUDA 12.0

/// Returns why this file cannot be used, or "". A rejected library stays loaded, because unloading a library that has threads is not safe.
std::string try_one(const std::string& place, lt::Library& library) {
  void* handle = open_library(place.c_str());
  if (!handle) return dlerror();
  const std::string missing = bind(library, [&](const char* name) { return symbol(handle, name); });
  if (!missing.empty()) return place + ": has no " + missing;
  const size_t version = library.get_version();
  if (version < kOldest) return place + ": version " + std::to_string(version) + ", older than CUDA 12";
  int driver = 0;
  cudaDriverGetVersion(&driver);
  if (version / 10000 > static_cast<size_t>(driver) / 1000) return place + ": needs a driver of CUDA " + std::to_string(version / 10000);
  return "";
}

Opened open_now() {
  Opened o;
  auto opens = [&](const std::string& file) {
    const std::string why = try_one(file, o.library);
    if (!why.empty()) o.why += why + "\n";
    return why.empty();
  };
  for (const std::string& place : places()) {
    const std::vector<std::string> files = is_pattern(place) ? matches(place) : std::vector{place};
    if (files.empty()) o.why += place + ": no such file\n";
    if (std::ranges::any_of(files, opens)) return {o.library, ""};
  }
  o.why += "(the environment variable UNIFLOW_CUBLASLT may name the file)";
  return o;
}

const Opened& opened() {
  static const auto* o = new Opened(open_now());  // never freed: kernels may still be queued while the process ends
  return *o;
}

const char* name_of(lt::Status status) {
  switch (status) {
    case lt::Status::Success: return "CUBLAS_STATUS_SUCCESS";
    case lt::Status::NotInitialized: return "CUBLAS_STATUS_NOT_INITIALIZED";
    case lt::Status::AllocFailed: return "CUBLAS_STATUS_ALLOC_FAILED";
    case lt::Status::InvalidValue: return "CUBLAS_STATUS_INVALID_VALUE";
    case lt::Status::ArchMismatch: return "CUBLAS_STATUS_ARCH_MISMATCH";
    case lt::Status::MappingError: return "CUBLAS_STATUS_MAPPING_ERROR";
    case lt::Status::ExecutionFailed: return "CUBLAS_STATUS_EXECUTION_FAILED";
    case lt::Status::InternalError: return "CUBLAS_STATUS_INTERNAL_ERROR";
    case lt::Status::NotSupported: return "CUBLAS_STATUS_NOT_SUPPORTED";
  }
  return "an unknown status";
}

}  // namespace

std::string open_cublaslt() { return opened().why; }

std::vector<std::string> cublaslt_files() {
  std::vector<std::string> files;
  for (const std::string& place : places()) {
    if (!is_pattern(place)) files.push_back(place);
    else std::ranges::copy(matches(place), std::back_inserter(files));
  }
  return files;
}

std::string cublaslt_version() {
  if (!opened().why.empty()) return "";
  const size_t v = opened().library.get_version();
  return std::to_string(v / 10000) + "." + std::to_string(v / 100 % 100) + "." + std::to_string(v % 100);
}

namespace lt {

const Library& library() {
  if (!opened().why.empty()) throw Error(ErrorCode::Unsupported, "cuBLASLt cannot be used:\n" + opened().why);
  return opened().library;
}

void check(Status status, const char* call) {
  if (status == Status::Success) return;
  throw Error(status == Status::AllocFailed ? ErrorCode::OutOfMemory : ErrorCode::Internal,
              std::string("cuBLASLt failed in ") + call + ": " + name_of(status) + " (" + std::to_string(static_cast<int>(status)) + ")");
}

}  // namespace lt
}  // namespace uniflow::cuda
