#include "native/core/tensor.h"

#include "native/core/device.h"

namespace uniflow {

int64_t count(const Shape& shape) {
  int64_t n = 1;
  for (int64_t d : shape) n *= d;
  return n;
}

std::string to_string(const Shape& shape) {
  std::string s = "[";
  for (size_t i = 0; i < shape.size(); ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + "]";
}

namespace {

Allocator& allocator_of(const Buffer& b) { return b.placement == Placement::Staging ? b.device.staging() : b.device.memory(); }

}  // namespace

Buffer::~Buffer() {
  if (!data) return;
  auto release = [&allocator = allocator_of(*this), data = data, bytes = bytes, placement = placement](auto) {
    allocator.release(data, bytes, placement);
  };
  // Pooled memory is reused in the stream's order. Other memory must wait for the work that still uses it.
  if (placement == Placement::Transfer || placement == Placement::Persistent) device.backend().after(release);
  else release(nullptr);
}

void Buffer::allocate() {
  if (data) return;
  try {
    data = allocator_of(*this).allocate(bytes, placement);
  } catch (const Error&) {  // freed memory may still be waiting for its release
    device.backend().settle();
    data = allocator_of(*this).allocate(bytes, placement);
  }
}

namespace {

/// Size in bytes of a new tensor. Rejects negative dimensions and a product that overflows.
int64_t checked_bytes(DType dtype, const Shape& shape) {
  int64_t bytes = size_of(dtype);
  for (int64_t d : shape)
    if (d < 0 || __builtin_mul_overflow(bytes, d, &bytes))
      throw Error(ErrorCode::BadInput, "shape", "dimensions from 0, and a size that 64 bits count", to_string(shape));
  return bytes;
}

}  // namespace

Tensor::Tensor(Device& device, DType dtype, Shape shape, Placement placement)
    : dtype_(dtype), shape_(std::move(shape)), buffer_(std::make_shared<Buffer>(device, checked_bytes(dtype, shape_), placement)) {}

Tensor::Tensor(Device& device, DType dtype, Shape shape, std::shared_ptr<const Packing> packing, int64_t bytes)
    : dtype_(dtype),
      shape_(std::move(shape)),
      buffer_(std::make_shared<Buffer>(device, bytes, Placement::Persistent)),
      packing_(std::move(packing)) {}

Tensor Tensor::reshape(Shape shape) const {
  Tensor view = *this;
  view.shape_ = std::move(shape);
  return view;
}

Tensor Tensor::slice(int64_t begin, int64_t end) const {
  Tensor view = *this;
  const int64_t row = shape_[0] ? bytes() / shape_[0] : 0;
  view.offset_ += begin * row;
  view.shape_[0] = end - begin;
  return view;
}

}  // namespace uniflow
