/// Stands in for <cuda_runtime.h>, so that native/cuda/*.cu are compiled by the host's compiler and run on the CPU: kernels are
/// tested wherever the tests run, with the address sanitizer if wished, though few machines there have a GPU.
///
/// Each thread of a block is a fiber that runs, ahead of the others, up to the next barrier or warp collective; which one goes
/// next is drawn from a seed (environment variable UNIFLOW_EMULATOR_SEED), so that races between barriers give wrong results.
/// Memory holds garbage until it is written: NaN, or large negative numbers, in turn. A barrier or collective that a thread never
/// reaches, and lanes of a warp that meet in different collectives, end the process with a message.
///
/// Not covered: timing, memory ordering between blocks, limits of the hardware such as registers and static shared memory,
/// lanes that diverge around a collective of the full warp (here too only some orders are tried), and kernels that read host
/// memory, because it is the same memory here.
///
/// Each stream has a thread that runs its work in order, some time later: see queue.cpp. A wait that is missing, or memory that is used
/// again too early, gives wrong results under some seeds. A stream that is being captured records its work for cudaGraphLaunch.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include <atomic>
#include <bit>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

// --- the language ---------------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ __inline__ __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static thread_local  // a block runs in one thread of the host

#define UNIFLOW_VECTORS(T, name, align1, align2, align3, align4)        \
  struct alignas(align1) name##1 { T x; };                              \
  struct alignas(align2) name##2 { T x, y; };                           \
  struct alignas(align3) name##3 { T x, y, z; };                        \
  struct alignas(align4) name##4 { T x, y, z, w; };                     \
  constexpr name##1 make_##name##1(T x) { return {x}; }                 \
  constexpr name##2 make_##name##2(T x, T y) { return {x, y}; }         \
  constexpr name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
  constexpr name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
UNIFLOW_VECTORS(signed char, char, 1, 2, 1, 4)
UNIFLOW_VECTORS(unsigned char, uchar, 1, 2, 1, 4)
UNIFLOW_VECTORS(short, short, 2, 4, 2, 8)
UNIFLOW_VECTORS(unsigned short, ushort, 2, 4, 2, 8)
UNIFLOW_VECTORS(int, int, 4, 8, 4, 16)
UNIFLOW_VECTORS(unsigned, uint, 4, 8, 4, 16)
UNIFLOW_VECTORS(float, float, 4, 8, 4, 16)
UNIFLOW_VECTORS(long long, longlong, 8, 16, 8, 16)
UNIFLOW_VECTORS(unsigned long long, ulonglong, 8, 16, 8, 16)
UNIFLOW_VECTORS(double, double, 8, 16, 8, 16)
#undef UNIFLOW_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

extern constinit thread_local uint3 threadIdx, blockIdx;
extern constinit thread_local dim3 blockDim, gridDim;
constexpr int warpSize = 32;

typedef struct CUstream_st* cudaStream_t;

namespace emulator {

/// Runs thread_body in each thread of the grid; or records that, on a stream that is being captured. `kernel`, where it is given, must
/// have been allowed its shared memory beyond 48 KiB by cudaFuncSetAttribute. Errors are left to cudaGetLastError.
void launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, std::function<void()> thread_body,
            const void* kernel = nullptr);

/// The block's, of exactly the bytes of the launch.
void* dynamic_shared();

enum class Collective { SyncWarp, Shuffle, ShuffleUp, ShuffleDown, ShuffleXor, Ballot, Any, All, Exchange };

/// Every lane of `mask` deposits `bytes` at `mine`, waits for the others, and gets all the lanes' deposits, one after the other.
const void* collective(Collective kind, unsigned mask, const void* mine, size_t bytes);

/// The same for the twins of PTX instructions that a whole warp executes: the 32 lanes' values, valid until this lane's next collective.
template <class T>
const T* warp_exchange(const T& mine) {
  static_assert(std::is_trivially_copyable_v<T> && alignof(T) <= 64);
  return static_cast<const T*>(collective(Collective::Exchange, 0xffffffffu, &mine, sizeof(T)));
}

int lane_id();

/// What this thread of the block has begun and not yet finished, such as asynchronous copies: a list of its own, empty at its start.
std::vector<std::function<void()>>& deferred();

/// Lets the other threads of the block run until condition() holds; they may well run on in between anyhow.
void yield();
template <class Condition>
void wait_until(Condition&& condition) {
  while (!condition()) yield();
}

enum class Barrier { Sync, Or, And, Count };
int barrier(Barrier kind, bool predicate);

[[noreturn]] void die(const char* format, ...);  // with the kernel's block and thread

/// Memory of the device, of which cudaMalloc gives out no more than this; 1 GiB unless set.
void set_total_memory(size_t bytes);

/// cuBLASLt's function of that name, or null.
void* cublaslt_symbol(const char* name);
/// Number of products that cuBLASLt has been given.
uint64_t cublaslt_products();

}  // namespace emulator

// --- barriers and warps ----------------------------------------------------------------------------------------------------

inline void __syncthreads() { emulator::barrier(emulator::Barrier::Sync, false); }
inline int __syncthreads_or(int predicate) { return emulator::barrier(emulator::Barrier::Or, predicate != 0); }
inline int __syncthreads_and(int predicate) { return emulator::barrier(emulator::Barrier::And, predicate != 0); }
inline int __syncthreads_count(int predicate) { return emulator::barrier(emulator::Barrier::Count, predicate != 0); }

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  const char nothing = 0;
  emulator::collective(emulator::Collective::SyncWarp, mask, &nothing, 1);
}

namespace emulator {

/// This lane's value of lane `source`, or its own where that is outside its `width` lanes.
template <class T>
T shuffle(Collective kind, unsigned mask, T v, int source, bool inside) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  const T* values = static_cast<const T*>(collective(kind, mask, &v, sizeof v));
  if (!inside) return v;
  if ((mask >> source & 1) == 0) die("a shuffle reads lane %d, which is not in its mask %08x", source, mask);
  return values[source];
}

inline unsigned vote(Collective kind, unsigned mask, bool predicate) {
  const bool* values = static_cast<const bool*>(collective(kind, mask, &predicate, 1));
  unsigned set = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) set |= unsigned{values[lane]} << lane;
  return set;
}

}  // namespace emulator

template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32) {
  return emulator::shuffle(emulator::Collective::Shuffle, mask, v, (emulator::lane_id() & ~(width - 1)) | (source & (width - 1)), true);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  const int lane = emulator::lane_id(), source = lane - static_cast<int>(delta);
  return emulator::shuffle(emulator::Collective::ShuffleUp, mask, v, source, source >= (lane & ~(width - 1)));
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  const int lane = emulator::lane_id(), source = lane + static_cast<int>(delta);
  return emulator::shuffle(emulator::Collective::ShuffleDown, mask, v, source, source <= (lane | (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int other, int width = 32) {
  const int lane = emulator::lane_id(), source = lane ^ other;
  return emulator::shuffle(emulator::Collective::ShuffleXor, mask, v, source, source <= (lane | (width - 1)));
}
inline unsigned __ballot_sync(unsigned mask, int predicate) { return emulator::vote(emulator::Collective::Ballot, mask, predicate != 0); }
inline int __any_sync(unsigned mask, int predicate) { return emulator::vote(emulator::Collective::Any, mask, predicate != 0) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return emulator::vote(emulator::Collective::All, mask, predicate != 0) == mask; }

// --- memory ------------------------------------------------------------------------------------------------------------------

namespace emulator {

template <class T, class F>
T update(T* p, F&& f) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long> || std::is_same_v<T, float>);
  std::atomic_ref<T> cell(*p);
  T old = cell.load();
  while (!cell.compare_exchange_weak(old, f(old))) {
  }
  return old;
}
template <class T>
using Same = std::type_identity_t<T>;

}  // namespace emulator

template <class T>
T atomicAdd(T* p, emulator::Same<T> v) {
  return emulator::update(p, [=](T old) { return static_cast<T>(old + v); });
}
template <class T>
T atomicMax(T* p, emulator::Same<T> v) {
  return emulator::update(p, [=](T old) { return old < v ? v : old; });
}
template <class T>
T atomicMin(T* p, emulator::Same<T> v) {
  return emulator::update(p, [=](T old) { return v < old ? v : old; });
}
template <class T>
T atomicExch(T* p, emulator::Same<T> v) {
  return emulator::update(p, [=](T) { return v; });
}
template <class T>
T atomicCAS(T* p, emulator::Same<T> expected, emulator::Same<T> v) {
  return emulator::update(p, [=](T old) { return old == expected ? v : old; });
}

// The atomics above order all memory; only the compiler is left to be held back.
inline void __threadfence_block() { std::atomic_signal_fence(std::memory_order_seq_cst); }
inline void __threadfence() { std::atomic_signal_fence(std::memory_order_seq_cst); }

template <class T>
T __ldg(const T* p) {
  return *p;
}

// --- numbers -----------------------------------------------------------------------------------------------------------------

inline unsigned __float_as_uint(float v) { return std::bit_cast<unsigned>(v); }
inline float __uint_as_float(unsigned v) { return std::bit_cast<float>(v); }
inline int __float_as_int(float v) { return std::bit_cast<int>(v); }
inline float __int_as_float(int v) { return std::bit_cast<float>(v); }
inline int __float2int_rn(float v) { return static_cast<int>(rintf(v)); }
inline int __float2int_rd(float v) { return static_cast<int>(floorf(v)); }
inline int __float2int_rz(float v) { return static_cast<int>(v); }
inline float __int2float_rn(int v) { return static_cast<float>(v); }

inline int __popc(unsigned v) { return std::popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return std::countl_zero(static_cast<unsigned>(v)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32); }

// __fadd_rn and its like are never fused with another operation. That is up to -ffp-contract here.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float v) { return 1 / v; }
inline float __fsqrt_rn(float v) { return sqrtf(v); }
inline float __fdividef(float a, float b) { return a / b; }

// Macros: the C library declares some of these names for itself.
#define __expf(v) expf(v)
#define __logf(v) logf(v)
#define __log2f(v) log2f(v)
#define __powf(a, b) powf(a, b)
#define __sinf(v) sinf(v)
#define __cosf(v) cosf(v)
#define rsqrtf(v) (1 / sqrtf(v))

namespace emulator {

template <class A, class B>
concept Numbers = std::is_arithmetic_v<A> && std::is_arithmetic_v<B>;
}  // namespace emulator

template <class A, class B>
  requires emulator::Numbers<A, B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
  requires emulator::Numbers<A, B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

// --- the runtime ---------------------------------------------------------------------------------------------------------------

#define UNIFLOW_CUDA_ERRORS(X)                                                                                                       \
  X(Success, 0)                                                                                                                      \
  X(ErrorInvalidValue, 1) X(ErrorMemoryAllocation, 2) X(ErrorInitializationError, 3) X(ErrorInvalidConfiguration, 9)                 \
      X(ErrorInvalidPitchValue, 12) X(ErrorInvalidMemcpyDirection, 21) X(ErrorInsufficientDriver, 35) X(ErrorNoDevice, 100)          \
          X(ErrorInvalidDevice, 101) X(ErrorInvalidResourceHandle, 400) X(ErrorIllegalState, 401) X(ErrorNotReady, 600)              \
              X(ErrorIllegalAddress, 700) X(ErrorLaunchFailure, 719) X(ErrorNotSupported, 801) X(ErrorStreamCaptureUnsupported, 900) \
                  X(ErrorStreamCaptureInvalidated, 901) X(ErrorStreamCaptureMerge, 902) X(ErrorStreamCaptureUnmatched, 903)          \
                      X(ErrorStreamCaptureUnjoined, 904) X(ErrorStreamCaptureIsolation, 905) X(ErrorUnknown, 999)
enum cudaError_t {
#define X(name, value) cuda##name = value,
  UNIFLOW_CUDA_ERRORS(X)
#undef X
};

typedef struct CUevent_st* cudaEvent_t;
typedef struct CUgraph_st* cudaGraph_t;
typedef struct CUgraphExec_st* cudaGraphExec_t;
typedef void (*cudaHostFn_t)(void*);

enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal, cudaStreamCaptureModeRelaxed };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive, cudaStreamCaptureStatusInvalidated };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8, cudaFuncAttributePreferredSharedMemoryCarveout = 9 };
enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
constexpr unsigned cudaStreamDefault = 0, cudaStreamNonBlocking = 1;
constexpr unsigned cudaEventDefault = 0, cudaEventBlockingSync = 1, cudaEventDisableTiming = 2;
constexpr unsigned cudaHostAllocDefault = 0, cudaHostAllocPortable = 1, cudaHostAllocMapped = 2, cudaHostAllocWriteCombined = 4;

struct cudaDeviceProp {
  char name[256];
  size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin;
  int multiProcessorCount, major, minor, l2CacheSize, maxThreadsPerBlock, warpSize;
};

const char* cudaGetErrorName(cudaError_t);
const char* cudaGetErrorString(cudaError_t);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();

cudaError_t cudaDriverGetVersion(int*);
cudaError_t cudaRuntimeGetVersion(int*);
cudaError_t cudaGetDeviceCount(int*);
cudaError_t cudaSetDevice(int);
cudaError_t cudaGetDevice(int*);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp*, int device);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaMemGetInfo(size_t* free, size_t* total);

cudaError_t cudaMalloc(void** p, size_t bytes);
cudaError_t cudaFree(void* p);
cudaError_t cudaMallocHost(void** p, size_t bytes, unsigned flags = 0);
cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned flags);
cudaError_t cudaFreeHost(void* p);
template <class T>
cudaError_t cudaMalloc(T** p, size_t bytes) {
  return cudaMalloc(reinterpret_cast<void**>(p), bytes);
}
template <class T>
cudaError_t cudaMallocHost(T** p, size_t bytes, unsigned flags = 0) {
  return cudaMallocHost(reinterpret_cast<void**>(p), bytes, flags);
}
template <class T>
cudaError_t cudaHostAlloc(T** p, size_t bytes, unsigned flags) {
  return cudaHostAlloc(reinterpret_cast<void**>(p), bytes, flags);
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t = nullptr);
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height, cudaMemcpyKind,
                              cudaStream_t = nullptr);
cudaError_t cudaMemset(void* to, int value, size_t bytes);
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t = nullptr);
cudaError_t cudaMemset2DAsync(void* to, size_t pitch, int value, size_t width, size_t height, cudaStream_t = nullptr);

cudaError_t cudaStreamCreate(cudaStream_t*);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t*, unsigned flags);
cudaError_t cudaStreamCreateWithPriority(cudaStream_t*, unsigned flags, int priority);
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest);
cudaError_t cudaStreamDestroy(cudaStream_t);
cudaError_t cudaStreamSynchronize(cudaStream_t);
cudaError_t cudaStreamQuery(cudaStream_t);
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned flags = 0);
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t, void* data);

cudaError_t cudaEventCreate(cudaEvent_t*);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t*, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t);
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t = nullptr);
cudaError_t cudaEventSynchronize(cudaEvent_t);
cudaError_t cudaEventQuery(cudaEvent_t);
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to);

cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode);
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t*);
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus*);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t*, cudaGraph_t, unsigned long long flags = 0);
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t);
cudaError_t cudaGraphDestroy(cudaGraph_t);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t);

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value);
template <class... Args>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Args...), cudaFuncAttribute which, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), which, value);
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int /*threads*/, size_t /*shared_bytes*/) {
  *blocks = 1;
  return cudaSuccess;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};
template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  const auto run = [=] { kernel(static_cast<Params>(args)...); };
  emulator::launch(config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream, run, reinterpret_cast<const void*>(kernel));
  return cudaGetLastError();
}
