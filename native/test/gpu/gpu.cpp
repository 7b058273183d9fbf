#include "native/test/gpu/gpu.h"

#include <algorithm>

#include "native/core/device.h"
#include "native/cuda/runtime.h"

namespace uniflow::test {
namespace {

void copy(void* to, const void* from, int64_t bytes, cudaMemcpyKind kind) {
  if (bytes == 0) return;
  cuda::check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), kind, cuda::stream()), "cudaMemcpyAsync");
}

void wait_for_gpu() { cuda::check(cudaStreamSynchronize(cuda::stream()), "cudaStreamSynchronize"); }

/// Not through the allocator, which rounds sizes up.
void* allocate_exactly(int64_t bytes) {
  void* p = nullptr;
  cuda::check(cudaMalloc(&p, static_cast<size_t>(std::max<int64_t>(bytes, 1))), "cudaMalloc");
  return p;
}

/// Array reads int32 as the bits of a float.
double value(const Array& a, int64_t i) {
  if (a.dtype() == DType::Int32) return static_cast<int32_t*>(a.data())[i];
  return a[i];
}

}  // namespace

Device& gpu_device() {
  static Device& device = [&]() -> Device& {
    Device& d = Device::get("cuda:0");
    d.backend().enter(d);
    return d;
  }();
  return device;
}

const Kernels& gpu() { return gpu_device().kernels(); }

DeviceArray::DeviceArray(DType dtype, int64_t n) : dtype_(dtype), n_(n), data_(allocate_exactly(bytes())) {
  cuda::check(cudaMemsetAsync(data_, 0xff, static_cast<size_t>(bytes()), cuda::stream()), "cudaMemsetAsync");
}

DeviceArray::DeviceArray(const Array& host) : dtype_(host.dtype()), n_(host.size()), data_(allocate_exactly(bytes())) {
  copy(data_, host.data(), bytes(), cudaMemcpyHostToDevice);
  wait_for_gpu();
}

DeviceArray DeviceArray::normal(DType dtype, int64_t n, float deviation) {
  const Array block(dtype, test::normal(std::min<int64_t>(n, 1 << 20), 1, deviation));
  DeviceArray out(dtype, n);
  copy(out.data_, block.data(), block.size() * size_of(dtype), cudaMemcpyHostToDevice);
  for (int64_t done = block.size() * size_of(dtype); done > 0 && done < out.bytes(); done *= 2)
    copy(out.as<std::byte>() + done, out.data_, std::min(done, out.bytes() - done), cudaMemcpyDeviceToDevice);
  wait_for_gpu();
  return out;
}

DeviceArray::~DeviceArray() {
  if (data_) cudaFree(data_);  // waits for whatever uses it
}

DeviceArray::DeviceArray(DeviceArray&& other) noexcept : dtype_(other.dtype_), n_(other.n_), data_(std::exchange(other.data_, nullptr)) {}

Array DeviceArray::host() const {
  Array out(dtype_, n_);
  copy(out.data(), data_, bytes(), cudaMemcpyDeviceToHost);
  wait_for_gpu();
  return out;
}

void attempt(const std::string& name, const std::function<void()>& body) {
  try {
    body();
  } catch (const std::exception& e) {
    check(false, name, e.what());
    DeviceArray(DType::Float32, 1).host();  // throws if the device is lost
  }
}

Tensor to_gpu(const Array& values, Shape shape) {
  Tensor t(gpu_device(), values.dtype(), std::move(shape));
  t.buffer()->allocate();
  copy(t.data(), values.data(), t.bytes(), cudaMemcpyHostToDevice);
  wait_for_gpu();
  return t;
}

Array to_host(const Tensor& tensor) {
  Array out(tensor.dtype(), tensor.size());
  copy(out.data(), tensor.data(), tensor.bytes(), cudaMemcpyDeviceToHost);
  wait_for_gpu();
  return out;
}

void check_close(const Array& got, const Array& want, double tolerance, const std::string& name) {
  if (got.size() != want.size()) return check(false, name, std::to_string(got.size()) + " values, not " + std::to_string(want.size()));
  double largest = 1;
  for (int64_t i = 0; i < want.size(); ++i)
    if (const double w = std::abs(value(want, i)); std::isfinite(w)) largest = std::max(largest, w);
  double worst = 0;
  int64_t where = 0;
  for (int64_t i = 0; i < got.size(); ++i) {
    const double g = value(got, i), w = value(want, i);
    const double error = g == w ? 0 : std::abs(g - w) / largest;
    if (error <= worst) continue;
    worst = std::isfinite(error) ? error : std::numeric_limits<double>::infinity();
    where = i;
    if (!std::isfinite(worst)) break;
  }
  std::string detail = "error " + text("%.2e", worst) + " of " + text("%.0e", tolerance);
  if (!(worst <= tolerance))
    detail += ", at " + std::to_string(where) + " of " + std::to_string(got.size()) + ": " + text("%.8g", value(got, where)) + ", not " +
              text("%.8g", value(want, where));
  check(worst <= tolerance, name, detail);
}

}  // namespace uniflow::test
