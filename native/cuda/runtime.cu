/// One GPU as a device, with four CUDA streams. `compute` runs all kernels in order; `uploads` and `downloads` copy concurrently, ordered
/// by events; `recording` captures graphs. The thread that feeds the device never waits for it: a second thread waits for events and runs
/// the callbacks.
#include "native/cuda/runtime.h"

#include <sizes.h>

#include <algorithm>
#include <array>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <future>
#include <mutex>
#include <thread>
#include <utility>

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

Graph::Graph(const std::function<void()>& work) : device_(fed->index()) {
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
  if (!executable_) return;
  cudaSetDevice(device_);
  cudaGraphExecDestroy(executable_);
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

void Reaper::enqueue(const Item& item) {
  std::lock_guard lock(mutex_);
  items_.push_back(item);
  ++given_;
  if (!started_) std::thread([this] { work(); }).detach();  // like the other threads of a device, it outlives every user
  started_ = true;
  changed_.notify_all();
}

void Reaper::work() {
  cudaSetDevice(index_);
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return !items_.empty(); });
    const Item item = items_.front();
    items_.pop_front();
    lock.unlock();
    item.release(item.data);
    lock.lock();
    ++done_;
    changed_.notify_all();
  }
}

void Reaper::drain() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&, until = given_] { return done_ >= until; });
}

void* DeviceMemory::try_allocate(int64_t bytes) {
  check(cudaSetDevice(index_), "cudaSetDevice");
  // Leave room for the driver, which allocates memory for code when it is first used.
  size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  if (free < static_cast<size_t>(bytes) + std::min<size_t>(size_t{512} << 20, total / 16)) return nullptr;
  void* p = nullptr;
  return is_full(cudaMalloc(&p, static_cast<size_t>(bytes)), "cudaMalloc") ? nullptr : p;
}

void* DeviceMemory::allocate(int64_t bytes) {
  if (void* p = try_allocate(bytes)) return p;
  reaper_.drain();
  return try_allocate(bytes);
}

void DeviceMemory::release(void* data, int64_t) noexcept { reaper_.free_device(data); }

int64_t DeviceMemory::pool_limit() const { return int64_t{1} << 46; }  // no limit: the allocator empties its pool when the device is full

void* StagingMemory::allocate(int64_t bytes) {
  void* p = nullptr;
  check(cudaSetDevice(index_), "cudaSetDevice");
  return is_full(cudaHostAlloc(&p, static_cast<size_t>(bytes), cudaHostAllocPortable), "cudaHostAlloc") ? nullptr : p;
}

void StagingMemory::release(void* data, int64_t) noexcept { reaper_.free_host(data); }

int64_t StagingMemory::pool_limit() const { return int64_t{1} << 30; }  // uploads of whole batches; downloads take a few chunks

// --- the device --------------------------------------------------------------------------------------------------------

CudaBackend::CudaBackend(int index) : index_(index), reaper_(index), memory_(index, reaper_), staging_(index, reaper_) {
  check(cudaSetDevice(index), "cudaSetDevice");
  properties_ = query_properties(index);
  for (cudaStream_t* s : {&compute_, &uploads_, &downloads_, &recording_}) *s = make_stream();
  std::thread([this] { wait_for_events(); }).detach();  // like the stream's own thread, they outlive every user
  std::thread([this] { run_downloads(); }).detach();
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
  waiting_.push_back({event, nullptr, std::move(then)});
  wake_.notify_one();
}

void CudaBackend::recycle(cudaEvent_t event) {
  std::lock_guard lock(mutex_);
  spare_events_.push_back(event);
}

void CudaBackend::upload(const Tensor& to, const Tensor& staged) {
  const cudaEvent_t copied = event();  // created first: once the copy is queued, nothing may fail before it is waited for
  check(cudaMemcpyAsync(to.data(), staged.data(), static_cast<size_t>(to.bytes()), cudaMemcpyHostToDevice, uploads_), "cudaMemcpyAsync");
  check(cudaEventRecord(copied, uploads_), "cudaEventRecord");
  check(cudaStreamWaitEvent(compute_, copied, 0), "cudaStreamWaitEvent");
  when(copied, [staged](auto) {});
}

// --- downloads: chunk by chunk through page-locked memory, on a thread of their own --------------------------------------------

namespace {

constexpr int kChunks = 3;                            // on their way at a time
constexpr int64_t kBytesPerCopier = int64_t{4} << 20;  // below that, a thread is not worth starting
constexpr int64_t kCopiers = 4;  // the first write to fresh memory is slow (page faults), and one thread is far below a bus

/// The values in C order as `dtype`, or in bfloat16 if they are to be widened; x itself if it already has this form and stays as it is.
Tensor downloadable(const Tensor& x, DType dtype) {
  const bool widens = x.dtype() == DType::BFloat16 && dtype == DType::Float32;
  const bool changes = x.buffer()->placement == Placement::Persistent;  // in place, as by AdamW, perhaps before the copy has ended
  if (!x.packing() && !changes && (widens || x.dtype() == dtype)) return x;
  const DType type = !x.packing() && widens ? DType::BFloat16 : dtype;
  const Tensor out = scratch(type, x.shape());
  if (x.packing()) unpack(*x.packing(), x.data(), out.data(), type);
  else if (x.dtype() == type) copy_rows(out.data(), out.bytes(), x.data(), x.bytes(), x.bytes(), 1);
  else cast(x.data(), x.dtype(), out.data(), type, x.size());
  return out;
}

/// Values [first, first + n) of `from` to `to`, widened if `from` is bfloat16 and `to` float32.
void copy_values(const std::byte* from, DType from_dtype, std::byte* to, DType to_dtype, int64_t n) {
  if (from_dtype == to_dtype) {
    std::memcpy(to, from, static_cast<size_t>(n * size_of(to_dtype)));
    return;
  }
  const auto* narrow = reinterpret_cast<const bf16*>(from);
  auto* wide = reinterpret_cast<float*>(to);
  for (int64_t i = 0; i < n; ++i) wide[i] = to_float(narrow[i]);
}

/// The same, by several threads if there is much of it.
void copy_values_by_many(const std::byte* from, DType from_dtype, std::byte* to, DType to_dtype, int64_t n) {
  const int64_t copiers = std::clamp<int64_t>(n * size_of(to_dtype) / kBytesPerCopier, 1, kCopiers), each = (n + copiers - 1) / copiers;
  auto part = [=](int64_t k) {
    const int64_t first = std::min(n, k * each), count = std::min(n, first + each) - first;
    copy_values(from + first * size_of(from_dtype), from_dtype, to + first * size_of(to_dtype), to_dtype, count);
  };
  std::vector<std::jthread> others;
  for (int64_t k = 1; k < copiers; ++k) others.emplace_back(part, k);
  part(0);
}

}  // namespace

void CudaBackend::download(void* to, DType dtype, const Tensor& x) {
  if (x.size() == 0) return;
  const Tensor from = downloadable(x, dtype);
  const cudaEvent_t computed = event();
  check(cudaEventRecord(computed, compute_), "cudaEventRecord");
  auto download = std::make_shared<Download>(Download{to, dtype, from, computed});
  std::lock_guard lock(mutex_);
  given_downloads_.push_back(download);
  waiting_.push_back({nullptr, std::move(download), [](auto) {}});
  download_given_.notify_one();
  wake_.notify_one();
}

/// While one chunk is copied to its place, the device fills the next ones.
void CudaBackend::run(const Download& d) {
  const DType type = d.from.dtype();
  const int64_t all = d.from.size(), most = kChunkBytes / size_of(type), chunks = (all + most - 1) / most;
  struct Slot {
    Tensor staged;
    cudaEvent_t copied = nullptr;
  };
  std::array<Slot, kChunks> slots;
  auto values = [&](int64_t chunk) { return std::min(most, all - chunk * most); };
  auto request = [&](int64_t chunk) {
    Slot& slot = slots[static_cast<size_t>(chunk % kChunks)];
    if (!slot.staged) {
      slot.staged = Tensor(d.from.device(), DType::UInt8, {std::min(most, all) * size_of(type)}, Placement::Staging);
      slot.staged.buffer()->allocate();
      slot.copied = event();
    }
    check(cudaMemcpyAsync(slot.staged.data(), d.from.data<std::byte>() + chunk * most * size_of(type), static_cast<size_t>(values(chunk) * size_of(type)),
                          cudaMemcpyDeviceToHost, downloads_),
          "cudaMemcpyAsync");
    check(cudaEventRecord(slot.copied, downloads_), "cudaEventRecord");
  };
  check(cudaStreamWaitEvent(downloads_, d.computed, 0), "cudaStreamWaitEvent");
  for (int64_t chunk = 0; chunk < std::min<int64_t>(kChunks, chunks); ++chunk) request(chunk);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const Slot& slot = slots[static_cast<size_t>(chunk % kChunks)];
    check(cudaEventSynchronize(slot.copied), "cudaEventSynchronize");
    copy_values_by_many(slot.staged.data<std::byte>(), type, static_cast<std::byte*>(d.to) + chunk * most * size_of(d.dtype), d.dtype, values(chunk));
    if (chunk + kChunks < chunks) request(chunk + kChunks);
  }
  for (const Slot& slot : slots)
    if (slot.copied) recycle(slot.copied);
}

void CudaBackend::run_downloads() {
  cudaSetDevice(index_);
  std::unique_lock lock(mutex_);
  while (true) {
    download_given_.wait(lock, [&] { return !given_downloads_.empty(); });
    const std::shared_ptr<Download> next = std::move(given_downloads_.front());
    given_downloads_.pop_front();
    lock.unlock();
    std::shared_ptr<const Error> failure;
    try {
      run(*next);
    } catch (const Error& e) {
      failure = std::make_shared<const Error>(e);
      cudaStreamSynchronize(downloads_);  // nothing may be copied to memory that is free
    }
    next->from = Tensor();  // its memory is reused from here on
    recycle(next->computed);
    lock.lock();
    next->failure = std::move(failure);
    next->ended = true;
    download_ended_.notify_one();
  }
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

/// Why it failed, or null.
std::shared_ptr<const Error> CudaBackend::wait_for(const Waiting& waiting) {
  if (waiting.download) {
    std::unique_lock lock(mutex_);
    download_ended_.wait(lock, [&] { return waiting.download->ended; });
    return waiting.download->failure;
  }
  const cudaError_t status = waiting.event ? cudaEventSynchronize(waiting.event) : cudaSuccess;
  if (status == cudaSuccess) return nullptr;
  return std::make_shared<const Error>(ErrorCode::Internal,
                                       std::string("the GPU failed: ") + cudaGetErrorString(status) + "; start the process again to use it");
}

void CudaBackend::wait_for_events() {
  cudaSetDevice(index_);
  std::shared_ptr<const Error> download_failure;  // of the downloads since the last callback, which reports it
  std::unique_lock lock(mutex_);
  while (true) {
    wake_.wait(lock, [&] { return !waiting_.empty(); });
    Waiting next = std::move(waiting_.front());
    waiting_.pop_front();
    lock.unlock();
    std::shared_ptr<const Error> failure = wait_for(next);
    if (next.download) {
      if (failure) download_failure = std::move(failure);
    } else {
      next.then(failure ? failure : std::exchange(download_failure, nullptr));
    }
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
