/// The squared error and the flow's training pair on the GPU against the CPU's.
#include "native/test/gpu/gpu.h"

namespace uniflow::test {
namespace {

/// The gradient is checked as that of the sum.
void check_squared_error(int64_t n, bool with_grad, int64_t offset) {
  const Array v(DType::Float32, normal(n + offset, 1)), target(DType::Float32, normal(n + offset, 2)), loss(DType::Float32, 1);
  const Array grad(DType::Float32, n);
  const DeviceArray gpu_v(v), gpu_target(target), gpu_loss(DType::Float32, 1), gpu_grad(DType::Float32, n);
  cpu::kernels().mean_squared_error(v.floats() + offset, target.floats() + offset, with_grad ? grad.floats() : nullptr, loss.floats(), n);
  gpu().mean_squared_error(gpu_v.as<float>() + offset, gpu_target.as<float>() + offset, with_grad ? gpu_grad.as<float>() : nullptr,
                           gpu_loss.as<float>(), n);
  const std::string title = "mean_squared_error [" + std::to_string(n) + "]" + (offset ? ", not on 16 bytes" : "");
  if (n == 0) return check(std::isnan(gpu_loss.host()[0]), title + " is NaN");
  check_close(gpu_loss.host(), loss, 2e-6, title);
  if (!with_grad) return;
  const Array got = gpu_grad.host();
  for (int64_t i = 0; i < n; ++i) {
    grad.floats()[i] *= static_cast<float>(n);
    got.floats()[i] *= static_cast<float>(n);
  }
  check_close(got, grad, 1e-6, title + ", gradient");
}

void check_interpolate(int64_t rows, int64_t width, int64_t offset) {
  const int64_t n = rows * width;
  const Array data(DType::Float32, normal(n + offset, 1)), noise(DType::Float32, normal(n + offset, 2)), t(DType::Float32, normal(rows, 3));
  const Array noisy(DType::Float32, n), target(DType::Float32, n);
  const DeviceArray gpu_data(data), gpu_noise(noise), gpu_t(t), gpu_noisy(DType::Float32, n), gpu_target(DType::Float32, n);
  cpu::kernels().interpolate(data.floats() + offset, noise.floats() + offset, t.floats(), noisy.floats(), target.floats(), rows, width);
  gpu().interpolate(gpu_data.as<float>() + offset, gpu_noise.as<float>() + offset, gpu_t.as<float>(), gpu_noisy.as<float>(),
                    gpu_target.as<float>(), rows, width);
  const std::string title = "interpolate " + to_string(Shape{rows, width}) + (offset ? ", not on 16 bytes" : "");
  check_close(gpu_noisy.host(), noisy, 1e-6, title + ", noisy");
  check_close(gpu_target.host(), target, 0, title + ", target");
}

}  // namespace

void check_flow_loss() {
  for (const int64_t n : {0, 1, 7, 4096, 4097, 20003}) check_squared_error(n, n != 4096, 0);
  check_squared_error(1025, true, 1);
  for (const auto& [rows, width] : {std::pair{1, 1}, std::pair{7, 17}, std::pair{65, 768}, std::pair{3, 1025}})
    check_interpolate(rows, width, 0);
  check_interpolate(5, 64, 1);
}

void bench_flow_loss() {
  const int64_t rows = emulated() ? 8 : 16384, width = 768, n = rows * width;
  const DeviceArray a = DeviceArray::normal(DType::Float32, n), b = DeviceArray::normal(DType::Float32, n), c(DType::Float32, n),
                    d(DType::Float32, n), t = DeviceArray::normal(DType::Float32, rows), loss(DType::Float32, 1);
  const std::string shape = to_string(Shape{rows, width});
  time_gpu("mean_squared_error " + shape, {0, static_cast<double>(3 * a.bytes())}, DType::Float32,
           [&] { gpu().mean_squared_error(a.as<float>(), b.as<float>(), c.as<float>(), loss.as<float>(), n); });
  time_gpu("interpolate " + shape, {0, static_cast<double>(4 * a.bytes())}, DType::Float32,
           [&] { gpu().interpolate(a.as<float>(), b.as<float>(), t.as<float>(), c.as<float>(), d.as<float>(), rows, width); });
}

}  // namespace uniflow::test
