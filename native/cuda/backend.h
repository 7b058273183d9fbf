/// One GPU; see runtime.cu.
#pragma once

#include <condition_variable>
#include <deque>
#include <mutex>

#include "native/core/backend.h"
#include "native/cuda/runtime.h"

namespace uniflow::cuda {

class DeviceMemory : public Memory {
 public:
  explicit DeviceMemory(int index) : index_(index) {}
  void* allocate(int64_t bytes) override;
  void release(void* data, int64_t bytes) noexcept override;
  std::string name() const override { return "memory of cuda:" + std::to_string(index_); }
  int64_t pool_limit() const override;

 private:
  int index_;
};

/// Page-locked host memory, which the copy engines can access directly.
class StagingMemory : public Memory {
 public:
  explicit StagingMemory(int index) : index_(index) {}
  void* allocate(int64_t bytes) override;
  void release(void* data, int64_t bytes) noexcept override;
  std::string name() const override { return "page-locked host memory"; }
  int64_t pool_limit() const override;

 private:
  int index_;
};

class CudaBackend : public Backend {
 public:
  explicit CudaBackend(int index);

  const Kernels& kernels() const override;  // table.cu
  std::string description() const override;
  Memory& memory() override { return memory_; }
  Memory* staging() override { return &staging_; }
  void enter(Device& device) override;
  void upload(const Tensor& to, const Tensor& staged) override;
  void download(void* to, DType dtype, const Tensor& from) override;
  void after(std::function<void(std::shared_ptr<const Error>)> then) override;
  void settle() override;

  const Properties& properties() const { return properties_; }
  cudaStream_t recording_stream() const { return recording_; }

 private:
  struct Waiting {
    cudaEvent_t event;
    std::function<void(std::shared_ptr<const Error>)> then;
  };

  cudaEvent_t event();
  void when(cudaEvent_t event, std::function<void(std::shared_ptr<const Error>)> then);
  void wait_for_events();

  int index_;
  DeviceMemory memory_;
  StagingMemory staging_;
  Properties properties_{};
  cudaStream_t compute_ = nullptr, uploads_ = nullptr, downloads_ = nullptr, recording_ = nullptr;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Waiting> waiting_;             // guarded by mutex_
  std::vector<cudaEvent_t> spare_events_;  // guarded by mutex_
};

/// The functions of Library, see loader.h.
int device_count(std::string& why);
std::string describe(int index);
std::unique_ptr<Backend> open(int index);

}  // namespace uniflow::cuda
