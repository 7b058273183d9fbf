/// The runtime: memory, copies, streams, events, graphs. All may be called by several threads of the host at once.
#include <chrono>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

#include "native/test/emulator/internal.h"

namespace emulator {

using Work = std::vector<std::function<void()>>;

/// What is recorded while streams are being captured.
struct Capture {
  cudaStream_t origin;
  cudaStreamCaptureMode mode;
  bool active = true, invalid = false;
  Work work{};
};

}  // namespace emulator

struct CUstream_st {
  std::shared_ptr<emulator::Capture> capture;  // none: runs its work at once
};
struct CUevent_st {
  bool timed, recorded = false;
  std::chrono::steady_clock::time_point time{};
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
  std::mutex mutex;  // guards all of this, and what streams and events hold
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
  if (!p) return cudaSuccess;
  if (refused_in_capture()) return result(cudaErrorStreamCaptureUnsupported);
  Runtime& r = runtime();
  std::lock_guard lock(r.mutex);
  const auto at = r.memory.find(reinterpret_cast<uintptr_t>(p));
  if (at == r.memory.end() || at->second.host != host) return result(cudaErrorInvalidValue);
  if (!host) r.used -= at->second.bytes;
  r.memory.erase(at);
  std::free(p);
  return cudaSuccess;
}

/// What the stream takes part in, or null. The mutex is held.
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
  work();
  return cudaSuccess;
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
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t cudaDriverGetVersion(int* v) { return *v = 13000, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* v) { return *v = 13000, cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* n) { return *n = 1, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return result(device == 0 ? cudaSuccess : cudaErrorInvalidDevice); }
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

cudaError_t cudaDeviceSynchronize() { return result(refused_in_capture() ? cudaErrorStreamCaptureUnsupported : cudaSuccess); }

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

cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height,
                              cudaMemcpyKind kind, cudaStream_t stream) {
  if (width == 0 || height == 0) return cudaSuccess;
  if (to_pitch < width || from_pitch < width) return result(cudaErrorInvalidPitchValue);
  if (!to || !from) return result(cudaErrorInvalidValue);
  if (static_cast<unsigned>(kind) > cudaMemcpyDefault) return result(cudaErrorInvalidMemcpyDirection);
  {
    std::lock_guard lock(runtime().mutex);
    const bool to_device = kind == cudaMemcpyDefault ? on_device(to) : kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    const bool from_device =
        kind == cudaMemcpyDefault ? on_device(from) : kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if (!lies_in(to, (height - 1) * to_pitch + width, to_device) || !lies_in(from, (height - 1) * from_pitch + width, from_device))
      return result(cudaErrorInvalidValue);
  }
  return submit(stream, [=] {
    for (size_t y = 0; y < height; ++y)
      std::memcpy(static_cast<std::byte*>(to) + y * to_pitch, static_cast<const std::byte*>(from) + y * from_pitch, width);
  });
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  return cudaMemcpy2DAsync(to, bytes, from, bytes, bytes, 1, kind, stream);
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return refused_in_capture() ? result(cudaErrorStreamCaptureUnsupported) : cudaMemcpyAsync(to, from, bytes, kind, nullptr);
}

cudaError_t cudaMemset2DAsync(void* to, size_t pitch, int value, size_t width, size_t height, cudaStream_t stream) {
  if (width == 0 || height == 0) return cudaSuccess;
  if (pitch < width) return result(cudaErrorInvalidPitchValue);
  {
    std::lock_guard lock(runtime().mutex);
    if (!lies_in(to, (height - 1) * pitch + width, true)) return result(cudaErrorInvalidValue);
  }
  return submit(stream, [=] {
    for (size_t y = 0; y < height; ++y) std::memset(static_cast<std::byte*>(to) + y * pitch, value, width);
  });
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  return cudaMemset2DAsync(to, bytes, value, bytes, 1, stream);
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  return refused_in_capture() ? result(cudaErrorStreamCaptureUnsupported) : cudaMemsetAsync(to, value, bytes, nullptr);
}

// --- streams ---------------------------------------------------------------------------------------------------------------

cudaError_t cudaStreamCreate(cudaStream_t* s) { return *s = new CUstream_st, cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) { return cudaStreamCreate(s); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int) { return cudaStreamCreate(s); }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) { return *least = 0, *greatest = -5, cudaSuccess; }

cudaError_t cudaStreamDestroy(cudaStream_t s) {
  if (!s) return result(cudaErrorInvalidResourceHandle);
  delete s;
  return cudaSuccess;
}

/// A stream that is being captured has nothing to wait for: that is refused, and spoils the capture.
static cudaError_t wait_for(cudaStream_t s) {
  std::lock_guard lock(runtime().mutex);
  Capture* c = capture_of(s);
  if (!c) return cudaSuccess;
  c->invalid = true;
  return result(cudaErrorStreamCaptureUnsupported);
}
cudaError_t cudaStreamSynchronize(cudaStream_t s) { return wait_for(s); }
cudaError_t cudaStreamQuery(cudaStream_t s) { return wait_for(s); }

cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void* data) {
  return f ? submit(s, [=] { f(data); }) : result(cudaErrorInvalidValue);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned) {
  if (!e) return result(cudaErrorInvalidResourceHandle);
  std::lock_guard lock(runtime().mutex);
  if (!e->capture) return cudaSuccess;  // has happened
  if (!s || !e->capture->active) return result(cudaErrorStreamCaptureIsolation);
  if (Capture* own = capture_of(s); own && own != e->capture.get()) return result(cudaErrorStreamCaptureMerge);
  s->capture = e->capture;  // this stream is captured too, from here on
  return cudaSuccess;
}

// --- events ----------------------------------------------------------------------------------------------------------------

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned flags) {
  return *e = new CUevent_st{!(flags & cudaEventDisableTiming)}, cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* e) { return cudaEventCreateWithFlags(e, cudaEventDefault); }
cudaError_t cudaEventDestroy(cudaEvent_t e) {
  if (!e) return result(cudaErrorInvalidResourceHandle);
  delete e;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
  if (!e) return result(cudaErrorInvalidResourceHandle);
  std::lock_guard lock(runtime().mutex);
  e->capture = capture_of(s) ? s->capture : nullptr;
  e->recorded = !e->capture;
  e->time = std::chrono::steady_clock::now();
  return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t e) {
  if (!e) return result(cudaErrorInvalidResourceHandle);
  std::lock_guard lock(runtime().mutex);
  return result(e->capture ? cudaErrorStreamCaptureUnsupported : cudaSuccess);
}
cudaError_t cudaEventSynchronize(cudaEvent_t e) { return cudaEventQuery(e); }

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
  std::lock_guard lock(runtime().mutex);
  if (!from || !to || !from->recorded || !to->recorded || !from->timed || !to->timed) return result(cudaErrorInvalidResourceHandle);
  *milliseconds = std::chrono::duration<float, std::milli>(to->time - from->time).count();
  return cudaSuccess;
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
