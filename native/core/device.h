/// The machine's devices: "cpu", and "cuda:0" and so on where there are any. Opened on first use, never closed.
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
  /// By name; "cuda" is "cuda:0". Throws Error(Unsupported) that says why there is none, and what was tried.
  static Device& get(const std::string& name);

  /// A device that is there, or the reason why there is none of its kind.
  struct Status {
    std::string name;
    bool available;
    std::string description;
  };
  static std::vector<Status> all();
  /// Those that have been opened.
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
