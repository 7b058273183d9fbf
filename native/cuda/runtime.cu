/// One GPU as a device, with four CUDA streams. `compute` runs all kernels in order; `uploads` and `downloads` copy concurrently, ordered
/// by events; `recording` captures graphs. The thread that feeds the device never waits for it: a second thread waits for events and runs
/// the callbacks.
#include "native/cuda/runtime.h"

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <future>
#include <mutex>
#include <thread>

#include "native/core/device.h"
#include "native/cuda/backend.h"
#include "native/cuda/cublaslt.h"
#include "native/cuda/kernels.h"

namespace uniflow::cuda {
namespace {

thread_local CudaBackend* fed = nullptr;                    // the device fed by this thread
thread_local Device* fed_device = nullptr;                  // the same
thread_local cudaStream_t current = nullptr;                // the stream of its kernels: compute, or recording
thread_local std::vector<Tensor>* graph_scratch = nullptr;  // scratch memory of the graph being recorded

std::string version_text(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

Properties query_properties(int index) {
  auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, index), "cudaDeviceGetAttribute");
    return value;
  };
  return {attribute(cudaDevAttrMultiProcessorCount), 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), attribute(cudaDevAttrL2CacheSize)};
}

cudaStream_t make_stream() {
  cudaStream_t stream;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  return stream;
}

}  // namespace

void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clear it, or the next call would report it again
  const std::string what = std::string(call) + ": " + cudaGetErrorString(status);
  throw Error(status == cudaErrorMemoryAllocation ? ErrorCode::OutOfMemory : ErrorCode::Internal, "the GPU failed in " + what);
}

cudaStream_t stream() { return current; }
const Properties& properties() { return fed->properties(); }
bool recording() { return graph_scratch != nullptr; }

Tensor scratch(DType dtype, Shape shape) {
  // A graph owns its memory for good, so memory that it has finished with is reused within the graph, whose work runs in order.
  if (graph_scratch)
    for (const Tensor& kept : *graph_scratch)
      if (kept.buffer().use_count() == 1 && kept.dtype() == dtype && kept.size() == count(shape)) return kept.reshape(std::move(shape));
  Tensor t(*fed_device, dtype, std::move(shape));
  t.buffer()->allocate();
  if (graph_scratch) graph_scratch->push_back(t);
  return t;
}

Tensor to_device(const void* host, int64_t bytes) {
  Tensor staged(*fed_device, DType::UInt8, {bytes}, Placement::Staging), t = scratch(DType::UInt8, {bytes});
  staged.buffer()->allocate();
  std::memcpy(staged.data(), host, static_cast<size_t>(bytes));
  check(cudaMemcpyAsync(t.data(), staged.data(), static_cast<size_t>(bytes), cudaMemcpyHostToDevice, stream()), "cudaMemcpyAsync");
  fed->after([staged](auto) {});
  return t;
}

void to_host(void* to, const void* from, int64_t bytes) {
  Tensor staged(*fed_device, DType::UInt8, {bytes}, Placement::Staging);
  staged.buffer()->allocate();
  check(cudaMemcpyAsync(staged.data(), from, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost, stream()), "cudaMemcpyAsync");
  check(cudaStreamSynchronize(stream()), "cudaStreamSynchronize");
  std::memcpy(to, staged.data(), static_cast<size_t>(bytes));
}

// --- graphs -----------------------------------------------------------------------------------------------------------

Graph::Graph(const std::function<void()>& work) {
  const cudaStream_t compute = current;
  cudaGraph_t graph = nullptr;
  // Relaxed: other threads continue to allocate and free.
  check(cudaStreamBeginCapture(fed->recording_stream(), cudaStreamCaptureModeRelaxed), "cudaStreamBeginCapture");
  current = fed->recording_stream();
  graph_scratch = &kept_;
  auto end = [&] {
    current = compute;
    graph_scratch = nullptr;
    return cudaStreamEndCapture(fed->recording_stream(), &graph);
  };
  try {
    work();
  } catch (...) {
    end();
    if (graph) cudaGraphDestroy(graph);
    cudaGetLastError();
    throw;
  }
  check(end(), "cudaStreamEndCapture");
  const cudaError_t status = cudaGraphInstantiate(&executable_, graph, 0);
  cudaGraphDestroy(graph);
  check(status, "cudaGraphInstantiate");
}

Graph::~Graph() {
  if (executable_) cudaGraphExecDestroy(executable_);
}

void Graph::launch() const { check(cudaGraphLaunch(executable_, stream()), "cudaGraphLaunch"); }

// --- memory -----------------------------------------------------------------------------------------------------------

namespace {

/// Whether memory has run out. Throws any other error, for example of an earlier kernel.
bool is_full(cudaError_t status, const char* call) {
  if (status != cudaErrorMemoryAllocation) check(status, call);
  cudaGetLastError();
  return status != cudaSuccess;
}

}  // namespace

void* DeviceMemory::allocate(int64_t bytes) {
  check(cudaSetDevice(index_), "cudaSetDevice");
  // Leave room for the driver, which allocates memory for code when it is first used.
  size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  if (free < static_cast<size_t>(bytes) + std::min<size_t>(size_t{512} << 20, total / 16)) return nullptr;
  void* p = nullptr;
  return is_full(cudaMalloc(&p, static_cast<size_t>(bytes)), "cudaMalloc") ? nullptr : p;
}

void DeviceMemory::release(void* data, int64_t) noexcept {
  cudaSetDevice(index_);
  cudaFree(data);  // waits for the device, so nothing uses it any more
}

int64_t DeviceMemory::pool_limit() const { return int64_t{1} << 46; }  // no limit: the allocator empties its pool when the device is full

void* StagingMemory::allocate(int64_t bytes) {
  void* p = nullptr;
  check(cudaSetDevice(index_), "cudaSetDevice");
  return is_full(cudaHostAlloc(&p, static_cast<size_t>(bytes), cudaHostAllocPortable), "cudaHostAlloc") ? nullptr : p;
}

void StagingMemory::release(void* data, int64_t) noexcept {
  cudaSetDevice(index_);
  cudaFreeHost(data);
}

int64_t StagingMemory::pool_limit() const { return int64_t{1} << 30; }

// --- the device --------------------------------------------------------------------------------------------------------

CudaBackend::CudaBackend(int index) : index_(index), memory_(index), staging_(index) {
  check(cudaSetDevice(index), "cudaSetDevice");
  properties_ = query_properties(index);
  for (cudaStream_t* s : {&compute_, &uploads_, &downloads_, &recording_}) *s = make_stream();
  std::thread([this] { wait_for_events(); }).detach();  // like the stream's own thread, it outlives every user
}

std::string CudaBackend::description() const { return describe(index_); }

void CudaBackend::enter(Device& device) {
  check(cudaSetDevice(index_), "cudaSetDevice");
  fed = this;
  fed_device = &device;
  current = compute_;
}

cudaEvent_t CudaBackend::event() {
  cudaEvent_t event = nullptr;
  {
    std::lock_guard lock(mutex_);
    if (!spare_events_.empty()) {
      event = spare_events_.back();
      spare_events_.pop_back();
    }
  }
  check(cudaSetDevice(index_), "cudaSetDevice");
  if (!event) check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventBlockingSync), "cudaEventCreateWithFlags");
  return event;
}

void CudaBackend::when(cudaEvent_t event, std::function<void(std::shared_ptr<const Error>)> then) {
  std::lock_guard lock(mutex_);
  waiting_.push_back({event, std::move(then)});
  wake_.notify_one();
}

void CudaBackend::upload(const Tensor& to, const Tensor& staged) {
  const cudaEvent_t copied = event();  // created first: once the copy is queued, nothing may fail before it is waited for
  check(cudaMemcpyAsync(to.data(), staged.data(), static_cast<size_t>(to.bytes()), cudaMemcpyHostToDevice, uploads_), "cudaMemcpyAsync");
  check(cudaEventRecord(copied, uploads_), "cudaEventRecord");
  check(cudaStreamWaitEvent(compute_, copied, 0), "cudaStreamWaitEvent");
  when(copied, [staged](auto) {});
}

namespace {

/// The values in C order as `dtype`; x itself if it already has this form.
Tensor converted(const Tensor& x, DType dtype) {
  if (!x.packing() && x.dtype() == dtype) return x;
  const Tensor out = scratch(dtype, x.shape());
  if (x.packing()) unpack(*x.packing(), x.data(), out.data(), dtype);
  else cast(x.data(), x.dtype(), out.data(), dtype, x.size());
  return out;
}

}  // namespace

void CudaBackend::download(void* to, DType dtype, const Tensor& x) {
  if (x.size() == 0) return;
  const Tensor from = converted(x, dtype);
  const int64_t bytes = from.bytes();
  Tensor staged(from.device(), DType::UInt8, {bytes}, Placement::Staging);
  staged.buffer()->allocate();
  const cudaEvent_t computed = event(), copied = event();
  check(cudaEventRecord(computed, compute_), "cudaEventRecord");
  check(cudaStreamWaitEvent(downloads_, computed, 0), "cudaStreamWaitEvent");
  check(cudaMemcpyAsync(staged.data(), from.data(), static_cast<size_t>(bytes), cudaMemcpyDeviceToHost, downloads_), "cudaMemcpyAsync");
  check(cudaEventRecord(copied, downloads_), "cudaEventRecord");
  if (from.buffer()->placement == Placement::Persistent)  // later work may change it in place, as AdamW does
    check(cudaStreamWaitEvent(compute_, copied, 0), "cudaStreamWaitEvent");
  when(computed, [](auto) {});
  // keeps `from` alive: its memory must not be reused during the copy
  when(copied, [=](std::shared_ptr<const Error> failure) {
    if (!failure && from) std::memcpy(to, staged.data(), static_cast<size_t>(bytes));
  });
}

void CudaBackend::after(std::function<void(std::shared_ptr<const Error>)> then) {
  cudaEvent_t reached = nullptr;
  try {
    reached = event();
    check(cudaEventRecord(reached, compute_), "cudaEventRecord");
  } catch (const Error& e) {
    auto failure = std::make_shared<const Error>(e);
    when(nullptr, [then = std::move(then), failure](auto) { then(failure); });
    return;
  }
  when(reached, std::move(then));
}

void CudaBackend::settle() {
  std::promise<void> called;
  after([&](auto) { called.set_value(); });
  called.get_future().wait();
}

void CudaBackend::wait_for_events() {
  cudaSetDevice(index_);
  std::unique_lock lock(mutex_);
  while (true) {
    wake_.wait(lock, [&] { return !waiting_.empty(); });
    Waiting next = std::move(waiting_.front());
    waiting_.pop_front();
    lock.unlock();
    std::shared_ptr<const Error> failure;
    const cudaError_t status = next.event ? cudaEventSynchronize(next.event) : cudaSuccess;
    if (status != cudaSuccess)
      failure = std::make_shared<const Error>(ErrorCode::Internal, std::string("the GPU failed: ") + cudaGetErrorString(status) +
                                                                       "; start the process again to use it");
    next.then(failure);
    next.then = nullptr;  // release its captures before the next wait
    lock.lock();
    if (next.event) spare_events_.push_back(next.event);
  }
}

// --- available devices ------------------------------------------------------------------------------------------------------

int device_count(std::string& why) {
  int driver = 0, runtime = 0, devices = 0;
  cudaRuntimeGetVersion(&runtime);
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    why = "there is no NVIDIA driver (libcuda.so.1)";
    return -1;
  }
  if (driver / 1000 < runtime / 1000) {
    why = "the NVIDIA driver is too old: it supports CUDA " + version_text(driver) + ", this build needs " + version_text(runtime / 1000 * 1000);
    return -1;
  }
  if (const cudaError_t status = cudaGetDeviceCount(&devices); status != cudaSuccess || devices == 0) {
    cudaGetLastError();
    why = std::string("the NVIDIA driver finds no GPU") + (status == cudaSuccess ? "" : ": " + std::string(cudaGetErrorString(status)));
    return -1;
  }
  if (const std::string missing = open_cublaslt(); !missing.empty()) {
    why = "cuBLASLt, a library of the CUDA toolkit, is missing:\n" + missing;
    return -1;
  }
  return devices;
}

std::string describe(int index) {
  cudaDeviceProp p;
  check(cudaGetDeviceProperties(&p, index), "cudaGetDeviceProperties");
  int driver = 0;
  cudaDriverGetVersion(&driver);
  return std::string(p.name) + ", " + std::to_string(p.totalGlobalMem >> 30) + " GiB, sm_" + std::to_string(p.major) + std::to_string(p.minor) +
         ", CUDA " + version_text(driver) + ", cuBLASLt " + cublaslt_version();
}

std::unique_ptr<Backend> open(int index) {
  const Properties p = query_properties(index);
  if (p.capability < 80)
    throw Error(ErrorCode::Unsupported, "device", "a GPU of compute capability 8.0 or more (Ampere and newer)", describe(index));
  return std::make_unique<CudaBackend>(index);
}

}  // namespace uniflow::cuda
