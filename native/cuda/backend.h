/// One GPU; see runtime.cu.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>

#include "native/core/backend.h"
#include "native/cuda/runtime.h"

namespace uniflow::cuda {

/// Frees memory on a thread of its own: cudaFree and cudaFreeHost wait until the device is idle, which no other thread should have to.
class Reaper {
 public:
  explicit Reaper(int index) : index_(index) {}
  void free_device(void* data) { enqueue({data, cudaFree}); }
  void free_host(void* data) { enqueue({data, cudaFreeHost}); }
  /// Waits until all that was given so far is free.
  void drain();

 private:
  struct Item {
    void* data;
    cudaError_t (*release)(void*);
  };
  void enqueue(const Item& item);
  void work();

  int index_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Item> items_;   // guarded by mutex_, as the rest
  bool started_ = false;
  uint64_t given_ = 0, done_ = 0;
};

class DeviceMemory : public Memory {
 public:
  DeviceMemory(int index, Reaper& reaper) : index_(index), reaper_(reaper) {}
  void* allocate(int64_t bytes) override;
  void release(void* data, int64_t bytes) noexcept override;
  std::string name() const override { return "memory of cuda:" + std::to_string(index_); }
  int64_t pool_limit() const override;

 private:
  void* try_allocate(int64_t bytes);

  int index_;
  Reaper& reaper_;
};

/// Page-locked host memory, which the copy engines can access directly.
class StagingMemory : public Memory {
 public:
  StagingMemory(int index, Reaper& reaper) : index_(index), reaper_(reaper) {}
  void* allocate(int64_t bytes) override;
  void release(void* data, int64_t bytes) noexcept override;
  std::string name() const override { return "page-locked host memory"; }
  int64_t pool_limit() const override;

 private:
  int index_;
  Reaper& reaper_;
};

/// Values on their way to the host.
struct Download {
  void* to;
  DType dtype;           // of the values there
  Tensor from;           // in that type, or bfloat16 to be widened to float32
  cudaEvent_t computed;  // `from` has its values
  bool ended = false;    // guarded by the backend's mutex
  std::shared_ptr<const Error> failure{};
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

  int index() const { return index_; }
  const Properties& properties() const { return properties_; }
  cudaStream_t recording_stream() const { return recording_; }

 private:
  /// For an event, for a download, or for neither.
  struct Waiting {
    cudaEvent_t event;
    std::shared_ptr<Download> download;
    std::function<void(std::shared_ptr<const Error>)> then;
  };

  cudaEvent_t event();
  void recycle(cudaEvent_t event);
  void when(cudaEvent_t event, std::function<void(std::shared_ptr<const Error>)> then);
  void wait_for_events();
  std::shared_ptr<const Error> wait_for(const Waiting& waiting);
  void run_downloads();
  void run(const Download& download);

  int index_;
  Reaper reaper_;
  DeviceMemory memory_;
  StagingMemory staging_;
  Properties properties_{};
  cudaStream_t compute_ = nullptr, uploads_ = nullptr, downloads_ = nullptr, recording_ = nullptr;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Waiting> waiting_;             // guarded by mutex_
  std::condition_variable download_given_, download_ended_;
  std::deque<std::shared_ptr<Download>> given_downloads_;  // guarded by mutex_
  std::vector<cudaEvent_t> spare_events_;  // guarded by mutex_
};

/// The functions of Library, see loader.h.
int device_count(std::string& why);
std::string describe(int index);
std::unique_ptr<Backend> open(int index);

}  // namespace uniflow::cuda
