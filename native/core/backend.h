/// The interface of a device: its memory, its kernels, and completion of its work.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "native/core/dtype.h"

namespace uniflow {

class Device;
class Error;
class Tensor;
struct Kernels;

/// The source of an Allocator's blocks.
class Memory {
 public:
  virtual ~Memory() = default;
  /// At least 64-byte aligned; null when out of memory.
  virtual void* allocate(int64_t bytes) = 0;
  virtual void release(void* data, int64_t bytes) noexcept = 0;
  /// For messages: "host memory", "memory of cuda:0".
  virtual std::string name() const = 0;
  /// The most memory that an Allocator keeps for reuse.
  virtual int64_t pool_limit() const = 0;
};

/// One device. Only its Stream's thread submits work; other threads may call only the methods marked "any thread".
class Backend {
 public:
  virtual ~Backend() = default;

  virtual const Kernels& kernels() const = 0;
  virtual std::string description() const = 0;
  /// Memory for tensors, and host memory for fast transfers (null: the same). Any thread.
  virtual Memory& memory() = 0;
  virtual Memory* staging() = 0;

  /// Called first on every thread that submits work; `device` is the owner of this backend.
  virtual void enter(Device& device) = 0;
  /// Fills a tensor (of Placement::Transfer, or one not yet used) from staging memory of the same size, before any later work. Keeps
  /// `staged` alive until then. Returns at once.
  virtual void upload(const Tensor& to, const Tensor& staged) = 0;
  /// Copies a tensor's values as `dtype` (a packed weight in C order) to the host after all work submitted so far. `to` must stay valid
  /// until the next callback given to after() has run.
  virtual void download(void* to, DType dtype, const Tensor& from) = 0;
  /// Calls `then` when all work submitted so far has ended, with null or with its failure; immediately, or later on another thread.
  /// Callbacks run in the order of the calls. Any thread.
  virtual void after(std::function<void(std::shared_ptr<const Error>)> then) = 0;
  /// Waits until all callbacks given to after() so far have run. Any thread except the one that runs them.
  virtual void settle() = 0;
};

}  // namespace uniflow
