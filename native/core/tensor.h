/// Tensors as the stream sees them: the shape is known at once, the memory exists once an op has produced it.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "native/core/allocator.h"
#include "native/core/dtype.h"
#include "native/core/error.h"

namespace uniflow {

class Device;
using Shape = std::vector<int64_t>;

int64_t count(const Shape& shape);
std::string to_string(const Shape& shape);  // "[2, 17, 64]"

/// Memory of one or more tensors. Allocated by the stream when the op that fills it runs, freed with the last reference.
struct Buffer {
  Buffer(Device& device, int64_t bytes, Placement placement) : device(device), bytes(bytes), placement(placement) {}
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void allocate();

  Device& device;
  const int64_t bytes;
  const Placement placement;
  void* data = nullptr;                   // written on the stream's thread only
  std::shared_ptr<const Error> failure;   // why there is no data; propagated to everything that depends on it
  std::shared_ptr<void> attachment;       // private data of the device's kernels, freed with the buffer
};

/// The memory layout of a linear layer's weight; each backend derives its own.
struct Packing {
  virtual ~Packing() = default;
};

/// A dense array in C order, or a packed linear weight. Cheap to copy: copies share the buffer.
class Tensor {
 public:
  Tensor() = default;
  Tensor(Device& device, DType dtype, Shape shape, Placement placement = Placement::Pooled);
  /// On the CPU.
  Tensor(DType dtype, Shape shape, Placement placement = Placement::Pooled);
  /// A linear weight [out, in] in the layout `packing`, `bytes` bytes long.
  Tensor(Device& device, DType dtype, Shape shape, std::shared_ptr<const Packing> packing, int64_t bytes);

  explicit operator bool() const { return buffer_ != nullptr; }
  Device& device() const { return buffer_->device; }
  DType dtype() const { return dtype_; }
  const Shape& shape() const { return shape_; }
  int64_t dim(int i) const { return shape_[static_cast<size_t>(i < 0 ? i + rank() : i)]; }
  int rank() const { return static_cast<int>(shape_.size()); }
  int64_t size() const { return count(shape_); }
  int64_t bytes() const { return size() * size_of(dtype_); }
  const std::shared_ptr<const Packing>& packing() const { return packing_; }
  const std::shared_ptr<Buffer>& buffer() const { return buffer_; }

  /// The same elements with another shape of equal size.
  Tensor reshape(Shape shape) const;
  /// Rows [begin, end) of the first dimension; shares the memory.
  Tensor slice(int64_t begin, int64_t end) const;

  template <class T = void>
  T* data() const {
    return reinterpret_cast<T*>(static_cast<std::byte*>(buffer_->data) + offset_);
  }

 private:
  DType dtype_ = DType::Float32;
  Shape shape_;
  int64_t offset_ = 0;  // bytes into the buffer
  std::shared_ptr<Buffer> buffer_;
  std::shared_ptr<const Packing> packing_;
};

}  // namespace uniflow
