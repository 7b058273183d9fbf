/// The runtime: memory, copies, streams, events, graphs. All may be called by several threads of the host at once.
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

#include "native/test/emulator/internal.h"

namespace emulator {

using Work = std::vector<std::function<void()>>;

/// The work recorded while streams are being captured.
struct Capture {
  cudaStream_t origin;
  cudaStreamCaptureMode mode;
  bool active = true, invalid = false;
  Work work{};
};

}  // namespace emulator

struct CUstream_st {
  std::shared_ptr<emulator::Queue> queue;
  std::shared_ptr<emulator::Capture> capture{};  // none: its work goes to the queue
};
struct CUevent_st {
  bool timed;
  emulator::Mark mark{};
  std::shared_ptr<emulator::Capture> capture{};  // recorded in a stream that was being captured
};
struct CUgraph_st {
  emulator::Work work;
};
struct CUgraphExec_st {
  std::shared_ptr<const emulator::Work> work;
};

namespace emulator {
namespace {

constexpr int kSharedBytes = 227 << 10, kSharedBytesUnasked = 48 << 10;

struct Memory {
  size_t bytes;
  bool host;
};

struct Runtime {
  std::mutex mutex;  // guards all of this, and what streams and events hold. No work is run or waited for under it
  std::map<uintptr_t, Memory> memory;
  size_t total = size_t{1} << 30, used = 0;
  uint64_t allocations = 0;
  std::map<const void*, int> shared_bytes;  // that kernels have been allowed
  std::vector<Capture*> strict;             // captures that are not relaxed
};

Runtime& runtime() {
  static Runtime& r = *new Runtime;  // outlives all threads
  return r;
}

thread_local cudaError_t last_error = cudaSuccess;

cudaError_t result(cudaError_t status) {
  if (failure() != cudaSuccess) status = failure();
  if (status != cudaSuccess) last_error = status;
  return status;
}

/// The allocation that p lies in, or null. The mutex is held.
const std::pair<const uintptr_t, Memory>* allocation(const void* p) {
  auto at = runtime().memory.upper_bound(reinterpret_cast<uintptr_t>(p));
  if (at == runtime().memory.begin()) return nullptr;
  --at;
  return reinterpret_cast<uintptr_t>(p) < at->first + std::max<size_t>(at->second.bytes, 1) ? &*at : nullptr;
}

/// Whether `bytes` from p lie in memory of the device; or of the host, which is all that the device does not have.
bool lies_in(const void* p, size_t bytes, bool device) {
  const auto* a = allocation(p);
  if (!a) return !device;
  return a->second.host != device && reinterpret_cast<uintptr_t>(p) + bytes <= a->first + a->second.bytes;
}

bool on_device(const void* p) {
  const auto* a = allocation(p);
  return a && !a->second.host;
}

const std::shared_ptr<Queue>& queue_of(cudaStream_t stream) { return stream ? stream->queue : default_queue(); }

/// Calls that would touch other streams are refused while anything is being captured in a strict mode, and spoil it.
bool refused_in_capture() {
  std::lock_guard lock(runtime().mutex);
  for (Capture* c : runtime().strict) c->invalid = true;
  return !runtime().strict.empty();
}

cudaError_t allocate(void** p, size_t bytes, bool host) {
  if (!p) return result(cudaErrorInvalidValue);
  if (refused_in_capture()) return result(cudaErrorStreamCaptureUnsupported);
  *p = nullptr;
  if (failure() != cudaSuccess) return result(failure());
  if (bytes == 0) return cudaSuccess;
  Runtime& r = runtime();
  std::lock_guard lock(r.mutex);
  if (!host && bytes > r.total - std::min(r.used, r.total)) return result(cudaErrorMemoryAllocation);
  if (posix_memalign(p, 256, bytes) != 0) return result(cudaErrorMemoryAllocation);
  std::memset(*p, garbage(r.allocations++), bytes);
  if (!host) r.used += bytes;
  r.memory[reinterpret_cast<uintptr_t>(*p)] = {bytes, host};
  return cudaSuccess;
}

cudaError_t release(void* p, bool host) {
  if (!p) return result(cudaSuccess);
  if (refused_in_capture()) return result(cudaErrorStreamCaptureUnsupported);
  wait_for_all();
  Runtime& r = runtime();
  std::lock_guard lock(r.mutex);
  const auto at = r.memory.find(reinterpret_cast<uintptr_t>(p));
  if (at == r.memory.end() || at->second.host != host) return result(cudaErrorInvalidValue);
  if (!host) r.used -= at->second.bytes;
  std::memset(p, garbage(r.allocations++), at->second.bytes);  // for those that still use it
  r.memory.erase(at);
  std::free(p);
  return result(cudaSuccess);
}

/// The capture that the stream takes part in, or null. The mutex is held.
Capture* capture_of(cudaStream_t stream) {
  if (!stream || !stream->capture) return nullptr;
  if (!stream->capture->active) stream->capture = nullptr;
  return stream->capture.get();
}

/// The mutex is held.
cudaError_t end_capture(cudaStream_t stream, std::shared_ptr<Capture>& out) {
  capture_of(stream);
  out = stream ? stream->capture : nullptr;
  if (!out) return cudaErrorIllegalState;
  if (out->origin != stream) return cudaErrorStreamCaptureUnmatched;
  std::erase(runtime().strict, out.get());
  stream->capture = nullptr;
  out->active = false;
  return out->invalid ? cudaErrorStreamCaptureInvalidated : cudaSuccess;
}

}  // namespace

void set_total_memory(size_t bytes) {
  std::lock_guard lock(runtime().mutex);
  runtime().total = bytes;
}

cudaError_t submit(cudaStream_t stream, std::function<void()> work) {
  {
    std::lock_guard lock(runtime().mutex);
    if (Capture* c = capture_of(stream)) {
      if (c->invalid) return result(cudaErrorStreamCaptureInvalidated);
      c->work.push_back(std::move(work));
      return cudaSuccess;
    }
  }
  append(queue_of(stream), std::move(work));
  return result(cudaSuccess);
}

void launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, std::function<void()> thread_body, const void* kernel) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const bool fits = threads >= 1 && threads <= 1024 && block.x <= 1024 && block.y <= 1024 && block.z <= 64 && grid.x >= 1 &&
                    grid.x <= 0x7fffffff && grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 && grid.z <= 65535;
  size_t allowed = kSharedBytes;
  if (kernel) {
    std::lock_guard lock(runtime().mutex);
    const auto at = runtime().shared_bytes.find(kernel);
    allowed = static_cast<size_t>(std::max(kSharedBytesUnasked, at == runtime().shared_bytes.end() ? 0 : at->second));
  }
  if (!fits) result(cudaErrorInvalidConfiguration);
  else if (shared_bytes > allowed) result(cudaErrorInvalidValue);
  else submit(stream, [=, body = std::move(thread_body)] { run_grid(grid, block, shared_bytes, body); });
}

}  // namespace emulator

using namespace emulator;

// --- errors and devices ----------------------------------------------------------------------------------------------------

const char* cudaGetErrorName(cudaError_t e) {
  switch (e) {
#define X(name, value) \
  case cuda##name:     \
    return "cuda" #name;
    UNIFLOW_CUDA_ERRORS(X)
#undef X
  }
  return "unrecognized error code";
}
const char* cudaGetErrorString(cudaError_t e) {
  if (e == cudaErrorMemoryAllocation) return "out of memory";
  return cudaGetErrorName(e);
}
cudaError_t cudaGetLastError() {
  const cudaError_t own = std::exchange(last_error, cudaSuccess);
  return failure() != cudaSuccess ? failure() : own;
}
cudaError_t cudaPeekAtLastError() { return failure() != cudaSuccess ? failure() : last_error; }

cudaError_t cudaDriverGetVersion(int* v) { return *v = 13000, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* v) { return *v = 13000, cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* n) { return *n = 1, cudaSuccess; }
/// Whether this thread has chosen a device. There is only one here, but with several, one that has not works on the first.
static thread_local bool device_chosen = false;
cudaError_t cudaSetDevice(int device) {
  device_chosen = true;
  return result(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  if (device != 0) return result(cudaErrorInvalidDevice);
  switch (which) {
    case cudaDevAttrMaxThreadsPerBlock:
      return *value = 1024, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return *value = kSharedBytesUnasked, cudaSuccess;
    case cudaDevAttrWarpSize:
      return *value = 32, cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      return *value = 4, cudaSuccess;
    case cudaDevAttrL2CacheSize:
      return *value = 1 << 20, cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      return *value = 9, cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      return *value = 0, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return *value = kSharedBytes, cudaSuccess;
  }
  return result(cudaErrorInvalidValue);
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  if (device != 0) return result(cudaErrorInvalidDevice);
  size_t free;
  *p = {"emulated", 0, kSharedBytesUnasked, kSharedBytes, 4, 9, 0, 1 << 20, 1024, 32};
  return cudaMemGetInfo(&free, &p->totalGlobalMem);
}

cudaError_t cudaDeviceSynchronize() {
  if (refused_in_capture()) return result(cudaErrorStreamCaptureUnsupported);
  wait_for_all();
  return result(cudaSuccess);
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  std::lock_guard lock(runtime().mutex);
  *total = runtime().total;
  *free = *total - std::min(runtime().used, *total);
  return cudaSuccess;
}

// --- memory ----------------------------------------------------------------------------------------------------------------

cudaError_t cudaMalloc(void** p, size_t bytes) { return allocate(p, bytes, false); }
cudaError_t cudaFree(void* p) { return release(p, false); }
cudaError_t cudaMallocHost(void** p, size_t bytes, unsigned) { return allocate(p, bytes, true); }
cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) { return allocate(p, bytes, true); }
cudaError_t cudaFreeHost(void* p) { return release(p, true); }

namespace {

/// Rows of bytes; `pitch` bytes from one to the next.
template <class Byte>
struct Rows {
  Byte* data;
  size_t pitch, width, height;
  size_t bytes() const { return (height - 1) * pitch + width; }
  Byte* row(size_t y) const { return data + y * pitch; }
};
using Target = Rows<std::byte>;
using Source = Rows<const std::byte>;

void copy_rows(const Target& to, const Source& from) {
  for (size_t y = 0; y < to.height; ++y) std::memcpy(to.row(y), from.row(y), to.width);
}

enum class Place { Pageable, PageLocked, Device };

/// The mutex is held.
Place place_of(const void* p) {
  const auto* a = allocation(p);
  return !a ? Place::Pageable : a->second.host ? Place::PageLocked : Place::Device;
}

/// A snapshot of the host's memory.
std::shared_ptr<std::vector<std::byte>> snapshot(const Source& from) {
  auto out = std::make_shared<std::vector<std::byte>>(from.width * from.height);
  copy_rows({out->data(), from.width, from.width, from.height}, from);
  return out;
}

/// False where memory that a piece of work uses is no longer there: only a graph's can be gone.
bool still_there(const void* p, size_t bytes, bool device) {
  std::lock_guard lock(runtime().mutex);
  if (lies_in(p, bytes, device)) return true;
  fail(cudaErrorIllegalAddress, "a graph copies or sets memory that has been freed");
  return false;
}

/// As Async, and tells where `from` lies.
cudaError_t copy(const Target& to, const Source& from, cudaMemcpyKind kind, cudaStream_t stream, Place* from_place = nullptr) {
  if (to.width == 0 || to.height == 0) return result(cudaSuccess);
  if (to.pitch < to.width || from.pitch < from.width) return result(cudaErrorInvalidPitchValue);
  if (!to.data || !from.data) return result(cudaErrorInvalidValue);
  if (static_cast<unsigned>(kind) > cudaMemcpyDefault) return result(cudaErrorInvalidMemcpyDirection);
  bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  bool at_call = false;  // memory that can be paged out is read before the call returns, though a graph reads it when it runs
  {
    std::lock_guard lock(runtime().mutex);
    if (kind == cudaMemcpyDefault) to_device = on_device(to.data), from_device = on_device(from.data);
    if (!lies_in(to.data, to.bytes(), to_device) || !lies_in(from.data, from.bytes(), from_device)) return result(cudaErrorInvalidValue);
    at_call = place_of(from.data) == Place::Pageable && !capture_of(stream);
    if (from_place) *from_place = place_of(from.data);
  }
  return submit(stream, [=, read = at_call ? snapshot(from) : nullptr] {
    if (!still_there(to.data, to.bytes(), to_device) || !still_there(from.data, from.bytes(), from_device)) return;
    copy_rows(to, read ? Source{read->data(), from.width, from.width, from.height} : from);
  });
}

Target rows(void* p, size_t pitch, size_t width, size_t height) { return {static_cast<std::byte*>(p), pitch, width, height}; }
Source rows(const void* p, size_t pitch, size_t width, size_t height) { return {static_cast<const std::byte*>(p), pitch, width, height}; }

}  // namespace

cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height,
                              cudaMemcpyKind kind, cudaStream_t stream) {
  return copy(rows(to, to_pitch, width, height), rows(from, from_pitch, width, height), kind, stream);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  return cudaMemcpy2DAsync(to, bytes, from, bytes, bytes, 1, kind, stream);
}

/// Waits for the copy, unless it is within the device, or from memory that can be paged out: then that has been read, and may be changed.
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  if (refused_in_capture()) return result(cudaErrorStreamCaptureUnsupported);
  Place from_place = Place::Device;
  const cudaError_t status = copy(rows(to, bytes, bytes, 1), rows(from, bytes, bytes, 1), kind, nullptr, &from_place);
  if (status != cudaSuccess) return status;
  const bool to_host = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyHostToHost || kind == cudaMemcpyDefault;
  if (to_host || from_place == Place::PageLocked) wait_for(mark(default_queue()));
  return result(cudaSuccess);
}

cudaError_t cudaMemset2DAsync(void* to, size_t pitch, int value, size_t width, size_t height, cudaStream_t stream) {
  if (width == 0 || height == 0) return result(cudaSuccess);
  if (pitch < width) return result(cudaErrorInvalidPitchValue);
  const Target target = rows(to, pitch, width, height);
  {
    std::lock_guard lock(runtime().mutex);
    if (!lies_in(to, target.bytes(), true)) return result(cudaErrorInvalidValue);
  }
  return submit(stream, [=] {
    if (!still_there(target.data, target.bytes(), true)) return;
    for (size_t y = 0; y < height; ++y) std::memset(target.row(y), value, width);
  });
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  return cudaMemset2DAsync(to, bytes, value, bytes, 1, stream);
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  return refused_in_capture() ? result(cudaErrorStreamCaptureUnsupported) : cudaMemsetAsync(to, value, bytes, nullptr);
}

// --- streams ---------------------------------------------------------------------------------------------------------------

cudaError_t cudaStreamCreate(cudaStream_t* s) { return cudaStreamCreateWithFlags(s, cudaStreamDefault); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned flags) {
  *s = new CUstream_st{open_queue(!(flags & cudaStreamNonBlocking))};
  return result(cudaSuccess);
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned flags, int) { return cudaStreamCreateWithFlags(s, flags); }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) { return *least = 0, *greatest = -5, cudaSuccess; }

cudaError_t cudaStreamDestroy(cudaStream_t s) {
  if (!s) return result(cudaErrorInvalidResourceHandle);
  close_queue(*s->queue);
  delete s;
  return result(cudaSuccess);
}

/// A stream that is being captured has nothing to wait for: that is refused, and spoils the capture.
static bool refused_while_captured(cudaStream_t s) {
  std::lock_guard lock(runtime().mutex);
  Capture* c = capture_of(s);
  if (c) c->invalid = true;
  return c != nullptr;
}
cudaError_t cudaStreamSynchronize(cudaStream_t s) {
  if (refused_while_captured(s)) return result(cudaErrorStreamCaptureUnsupported);
  wait_for(mark(queue_of(s)));
  return result(cudaSuccess);
}
cudaError_t cudaStreamQuery(cudaStream_t s) {
  if (refused_while_captured(s)) return result(cudaErrorStreamCaptureUnsupported);
  return result(reached(mark(queue_of(s))) ? cudaSuccess : cudaErrorNotReady);
}

cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void* data) {
  return f ? submit(s, [=] { f(data); }) : result(cudaErrorInvalidValue);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned) {
  if (!e) return result(cudaErrorInvalidResourceHandle);
  Mark awaited;
  {
    std::lock_guard lock(runtime().mutex);
    if (e->capture) {
      if (!s || !e->capture->active) return result(cudaErrorStreamCaptureIsolation);
      if (Capture* own = capture_of(s); own && own != e->capture.get()) return result(cudaErrorStreamCaptureMerge);
      s->capture = e->capture;  // this stream is captured too, from here on
      return result(cudaSuccess);
    }
    if (e->mark.queue && capture_of(s)) return result(cudaErrorStreamCaptureIsolation);  // a graph waits for nothing outside
    awaited = e->mark;
  }
  append_wait(queue_of(s), awaited);
  return result(cudaSuccess);
}

// --- events ----------------------------------------------------------------------------------------------------------------

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned flags) {
  return *e = new CUevent_st{!(flags & cudaEventDisableTiming)}, result(cudaSuccess);
}
cudaError_t cudaEventCreate(cudaEvent_t* e) { return cudaEventCreateWithFlags(e, cudaEventDefault); }
cudaError_t cudaEventDestroy(cudaEvent_t e) {
  if (!e) return result(cudaErrorInvalidResourceHandle);
  delete e;
  return result(cudaSuccess);
}

cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
  if (!e) return result(cudaErrorInvalidResourceHandle);
  {
    std::lock_guard lock(runtime().mutex);
    e->mark = {};
    e->capture = capture_of(s) ? s->capture : nullptr;
    if (e->capture) return result(cudaSuccess);
  }
  Mark now = mark(queue_of(s));
  std::lock_guard lock(runtime().mutex);
  e->mark = std::move(now);
  return result(cudaSuccess);
}

/// The event's mark, unless it was recorded in a stream that was being captured.
static cudaError_t mark_of(cudaEvent_t e, Mark& out) {
  if (!e) return result(cudaErrorInvalidResourceHandle);
  std::lock_guard lock(runtime().mutex);
  out = e->mark;
  return result(e->capture ? cudaErrorStreamCaptureUnsupported : cudaSuccess);
}
cudaError_t cudaEventQuery(cudaEvent_t e) {
  Mark m;
  if (const cudaError_t status = mark_of(e, m); status != cudaSuccess) return status;
  return result(reached(m) ? cudaSuccess : cudaErrorNotReady);
}
cudaError_t cudaEventSynchronize(cudaEvent_t e) {
  Mark m;
  if (const cudaError_t status = mark_of(e, m); status != cudaSuccess) return status;
  wait_for(m);
  return result(cudaSuccess);
}

/// By the queues' clocks, which count pieces of work: what is chosen by its time is the same in every run.
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
  std::lock_guard lock(runtime().mutex);
  if (!from || !to || !from->mark.queue || !to->mark.queue || !from->timed || !to->timed) return result(cudaErrorInvalidResourceHandle);
  if (!reached(from->mark) || !reached(to->mark)) return result(cudaErrorNotReady);
  *milliseconds = 1e-3f * static_cast<float>(static_cast<int64_t>(to->mark.clock - from->mark.clock));
  return result(cudaSuccess);
}

// --- graphs ----------------------------------------------------------------------------------------------------------------

cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode mode) {
  if (!s) return result(cudaErrorStreamCaptureUnsupported);
  std::lock_guard lock(runtime().mutex);
  if (capture_of(s)) return result(cudaErrorIllegalState);
  s->capture = std::make_shared<Capture>(Capture{s, mode});
  if (mode != cudaStreamCaptureModeRelaxed) runtime().strict.push_back(s->capture.get());
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* graph) {
  *graph = nullptr;
  std::lock_guard lock(runtime().mutex);
  std::shared_ptr<Capture> ended;
  const cudaError_t status = end_capture(s, ended);
  if (status == cudaSuccess) *graph = new CUgraph_st{std::move(ended->work)};
  return result(status);
}

cudaError_t cudaStreamIsCapturing(cudaStream_t s, cudaStreamCaptureStatus* status) {
  std::lock_guard lock(runtime().mutex);
  const Capture* c = capture_of(s);
  *status = !c ? cudaStreamCaptureStatusNone : c->invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  if (!executable || !graph) return result(cudaErrorInvalidValue);
  *executable = new CUgraphExec_st{std::make_shared<const Work>(graph->work)};
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t s) {
  if (!executable) return result(cudaErrorInvalidValue);
  return submit(s, [work = executable->work] {
    for (const auto& w : *work) w();
  });
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return result(graph ? cudaSuccess : cudaErrorInvalidValue);
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  if (executable && !device_chosen) fail(cudaErrorInvalidDevice, "a graph is destroyed by a thread that has not chosen its device");
  delete executable;
  return result(executable ? cudaSuccess : cudaErrorInvalidValue);
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute which, int value) {
  if (!kernel) return result(cudaErrorInvalidValue);
  if (which == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
  if (which != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > kSharedBytes) return result(cudaErrorInvalidValue);
  std::lock_guard lock(runtime().mutex);
  runtime().shared_bytes[kernel] = value;
  return cudaSuccess;
}
