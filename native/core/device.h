/// The machine's devices: "cpu", and "cuda:0" and so on if available. Opened on first use, never closed.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "native/core/allocator.h"
#include "native/core/backend.h"
#include "native/core/stream.h"

namespace uniflow {

class Device {
 public:
  static Device& cpu();
  /// By name; "cuda" means "cuda:0". Throws Error(Unsupported) with the reason and the libraries tried.
  static Device& get(const std::string& name);

  /// An available device, or the reason why its kind is unavailable.
  struct Status {
    std::string name;
    bool available;
    std::string description;
  };
  static std::vector<Status> all();
  /// Devices opened so far.
  static std::vector<Device*> opened();

  const std::string& name() const { return name_; }
  bool is_cpu() const { return this == &cpu(); }
  Backend& backend() { return *backend_; }
  const Kernels& kernels() const { return backend_->kernels(); }
  Allocator& memory() { return memory_; }
  Allocator& staging() { return staging_ ? *staging_ : memory_; }
  Stream& stream() { return *stream_; }

 private:
  Device(std::string name, std::unique_ptr<Backend> backend);

  std::string name_;
  std::unique_ptr<Backend> backend_;
  Allocator memory_;
  std::unique_ptr<Allocator> staging_;
  std::unique_ptr<Stream> stream_;
};

}  // namespace uniflow
