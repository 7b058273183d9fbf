/// Shared by the checks of native/cuda: the GPU's table of kernels, arrays in its memory, comparisons, and the benchmark's clock.
///
/// One file for each family of kernels, under the stem that it has in native/cuda: its check runs every kernel against the CPU's
/// (uniflow::cpu::kernels()) or a definition written out, its bench times it at the sizes of the published models. The same code runs
/// on a GPU and, with UNIFLOW_EMULATED, in the emulator.
#pragma once

#include <functional>
#include <string>

#include "native/cpu/kernels.h"
#include "native/ops/kernels.h"
#include "native/test/check.h"

namespace uniflow {
class Device;
}

namespace uniflow::test {

/// The GPU's kernels. They are called on the main thread, which has entered the device; they run in the order of the calls.
const Kernels& gpu();

/// Kernels run on the CPU, thread by thread: choose small sizes. Times mean nothing then.
constexpr bool emulated() {
#ifdef UNIFLOW_EMULATED
  return true;
#else
  return false;
#endif
}

/// Values in exactly their bytes of the device's memory, so that a memory checker sees a read or write past the end.
class DeviceArray {
 public:
  /// Filled with ones in every bit: NaN as a float, so that what a kernel forgets to write is seen.
  DeviceArray(DType dtype, int64_t n);
  explicit DeviceArray(const Array& host);
  /// Normal numbers, for large inputs of benchmarks (how fast a product runs depends on its numbers); they repeat after a million.
  static DeviceArray normal(DType dtype, int64_t n, float deviation = 1);
  ~DeviceArray();
  DeviceArray(DeviceArray&& other) noexcept;
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  DType dtype() const { return dtype_; }
  int64_t size() const { return n_; }
  int64_t bytes() const { return n_ * size_of(dtype_); }
  void* data() const { return data_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  /// Waits for everything that was queued, and copies the values back.
  Array host() const;

 private:
  DType dtype_;
  int64_t n_;
  void* data_;
};

/// For kernels that take tensors (flow).
Device& gpu_device();
Tensor to_gpu(const Array& values, Shape shape);
Array to_host(const Tensor& tensor);

/// |got - want| <= tolerance * max(1, largest |want|) everywhere; NaN is never equal. `got` and `want` may differ in their type.
void check_close(const Array& got, const Array& want, double tolerance, const std::string& name);

/// The least work of one call: its roofline bound is the longer of flops at the device's rate of products and bytes at its rate of copies.
struct Work {
  double flops, bytes;
};

/// Runs one case of a family. What it throws fails the case alone; a lost device ends the family.
void attempt(const std::string& name, const std::function<void()>& body);

/// Times `run`, which queues the kernel once, and adds a row to the table. `dtype` says which rate of products it is held against.
/// In the emulator it runs once. A row that throws is a failed check; the others follow.
void time_gpu(const std::string& name, Work work, DType dtype, const std::function<void()>& run);

// --- the families -----------------------------------------------------------------------------------------------------

void check_linear();
void bench_linear();
void check_flow();
void bench_flow();
void check_attention();
void bench_attention();
void check_attention_backward();
void bench_attention_backward();
void check_norm();
void bench_norm();
void check_patch();
void bench_patch();
void check_elementwise();
void bench_elementwise();
void check_random();
void bench_random();
void check_residual();
void bench_residual();
void check_flow_loss();
void bench_flow_loss();
void check_distillation();
void bench_distillation();
void check_codes();
void bench_codes();
void check_cross_entropy();
void bench_cross_entropy();
void check_optimizer();
void bench_optimizer();
void check_statistics();
void bench_statistics();
void check_quality();
void bench_quality();

/// Whole blocks and the whole encoder.
void bench_encoder();
/// Which products cuBLASLt takes: of which sizes and types, with which epilogues.
void bench_probe();

/// Single kernels against the reference's values in test/fixtures/golden.
void check_golden(const std::string& folder);
/// That nothing grows over many rounds, and that running out of memory is an error to recover from.
void check_memory();
/// That downloads bring every value; how far uploads hide behind the work before them.
void check_upload();
void bench_upload();

}  // namespace uniflow::test
