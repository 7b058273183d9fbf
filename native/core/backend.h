/// What a kind of device brings: its memory, its kernels, and a way to learn that its work has ended.
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

/// Where an Allocator's blocks come from.
class Memory {
 public:
  virtual ~Memory() = default;
  /// At least 64-byte aligned; null where there is none left.
  virtual void* allocate(int64_t bytes) = 0;
  virtual void release(void* data, int64_t bytes) noexcept = 0;
  /// "host memory", "memory of cuda:0": for messages.
  virtual std::string name() const = 0;
  /// How much an Allocator keeps for reuse.
  virtual int64_t pool_limit() const = 0;
};

/// One device. Work is given to it by one thread, its Stream's; only what says so may be called from others.
class Backend {
 public:
  virtual ~Backend() = default;

  virtual const Kernels& kernels() const = 0;
  virtual std::string description() const = 0;
  /// Memory of tensors, and memory of the host that transfers are fast from and to (null: the same). Any thread.
  virtual Memory& memory() = 0;
  virtual Memory* staging() = 0;

  /// Called first on every thread that gives it work; `device` is the one that it belongs to.
  virtual void enter(Device& device) = 0;
  /// Fills a tensor (of Placement::Transfer, or one that nothing has used yet) from staging memory of the same size, before the work that
  /// comes after; `staged` is kept until then. Returns at once.
  virtual void upload(const Tensor& to, const Tensor& staged) = 0;
  /// Copies a tensor's values (of a packed weight: in C order), as `dtype`, to the host once the work given so far has run. `to` must live
  /// until what is given to after() next is called.
  virtual void download(void* to, DType dtype, const Tensor& from) = 0;
  /// Calls `then` when all work given so far has run, with null or with why it failed; at once, or on another thread. In the order of the
  /// calls. Any thread.
  virtual void after(std::function<void(std::shared_ptr<const Error>)> then) = 0;
  /// Returns when everything that after() was given so far has been called. Any thread but the one that calls it.
  virtual void settle() = 0;
};

}  // namespace uniflow
