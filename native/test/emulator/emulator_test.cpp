/// The emulator, which all other tests of kernels rest on: what it computes, what it finds wrong, and what its runtime refuses.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "native/test/check.h"
#include <cuda_runtime.h>

using uniflow::test::check;

namespace {

constexpr unsigned kAll = 0xffffffffu;

template <class... Params, class... Args>
void launch(cudaStream_t stream, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, const Args&... args) {
  emulator::launch(
      grid, block, shared_bytes, stream, [kernel, ... values = static_cast<Params>(args)] { kernel(values...); },
      reinterpret_cast<const void*>(kernel));
}

/// Memory of the device with these values.
template <class T>
class OnDevice {
 public:
  explicit OnDevice(const std::vector<T>& values) : n_(values.size()) {
    cudaMalloc(&p_, n_ * sizeof(T));
    cudaMemcpy(p_, values.data(), n_ * sizeof(T), cudaMemcpyHostToDevice);
    cudaStreamSynchronize(nullptr);
  }
  explicit OnDevice(size_t n) : n_(n) { cudaMalloc(&p_, n * sizeof(T)); }
  ~OnDevice() { cudaFree(p_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  operator T*() const { return p_; }
  std::vector<T> host() const {
    std::vector<T> out(n_);
    cudaMemcpy(out.data(), p_, n_ * sizeof(T), cudaMemcpyDeviceToHost);
    return out;
  }

 private:
  size_t n_;
  T* p_ = nullptr;
};

std::vector<float> counting(size_t n, float from = 0) {
  std::vector<float> out(n);
  std::iota(out.begin(), out.end(), from);
  return out;
}

// --- kernels that are right -------------------------------------------------------------------------------------------------

__global__ void add(const float* a, const float* b, float* c, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  c[i] = a[i] + b[i];
}

template <class T>
__device__ T block_sum(T v) {
  __shared__ T partial[32];
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(kAll, v, offset);
  __syncthreads();
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
  __syncthreads();
  v = threadIdx.x % 32 < blockDim.x / 32 ? partial[threadIdx.x % 32] : T{};
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(kAll, v, offset);
  return v;
}
__global__ void sums(const float* in, double* out, int n) {
  double total = 0;
  for (int repeat = 0; repeat < 3; ++repeat) {
    float v = 0;
    for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) v += in[i];
    total += block_sum(v) + block_sum(double{v});
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = total;
}

/// out [columns, rows] = in [rows, columns] transposed, in tiles of 32 x 32, by 32 x 8 threads.
__global__ void transpose(const float* in, float* out, int rows, int columns) {
  float* tile = static_cast<float*>(emulator::dynamic_shared());  // [32, 33]
  const int x = static_cast<int>(threadIdx.x), left = static_cast<int>(blockIdx.x) * 32, top = static_cast<int>(blockIdx.y) * 32;
  for (int y = static_cast<int>(threadIdx.y); y < 32; y += 8)
    if (top + y < rows && left + x < columns) tile[y * 33 + x] = in[(top + y) * columns + left + x];
  __syncthreads();
  for (int y = static_cast<int>(threadIdx.y); y < 32; y += 8)
    if (left + y < columns && top + x < rows) out[(left + y) * rows + top + x] = tile[x * 33 + y];
}

__global__ void shuffles(int64_t* out) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t v = 100 + lane;
  int64_t* o = out + threadIdx.x * 8;
  o[0] = __shfl_sync(kAll, v, 5);
  o[1] = __shfl_up_sync(kAll, v, 3);
  o[2] = __shfl_down_sync(kAll, v, 3, 8);
  o[3] = __shfl_xor_sync(kAll, v, 9, 16);
  o[4] = __ballot_sync(kAll, lane % 3 == 0);
  o[5] = __any_sync(kAll, lane == 31) * 2 + __all_sync(kAll, lane < 31);
  const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;  // two collectives of one warp at once
  o[6] = __shfl_sync(half, v, lane < 16 ? 2 : 20);
  o[7] = emulator::warp_exchange(uint4{1, 2, 3, threadIdx.x})[31].w;
}

__global__ void votes(int* out) {
  if (threadIdx.x >= 70) return;  // of 100: not waited for
  const int count = __syncthreads_count(threadIdx.x % 2), some = __syncthreads_or(threadIdx.x == 99),
            all = __syncthreads_and(threadIdx.x < 70);
  out[threadIdx.x] = count * 10 + some * 2 + all;
}

__global__ void atomics(int* counter, float* sum, unsigned* most, int* last, int* done) {
  atomicAdd(counter, 2);
  atomicAdd(sum, 0.5f);
  atomicMax(most, blockIdx.x * blockDim.x + threadIdx.x);
  __threadfence();
  __shared__ int turn;
  __syncthreads();
  if (threadIdx.x == 0) turn = atomicAdd(done, 1);
  __syncthreads();
  if (turn == static_cast<int>(gridDim.x) - 1 && threadIdx.x == 0) *last = *counter;
}

__global__ void indices(unsigned* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] = block * 1000 + thread;
}

__global__ void pipeline(int* out) {
  __shared__ int arrived;  // by the last warp
  if (threadIdx.x == 0) arrived = 0;
  __syncthreads();
  if (threadIdx.x >= 32) atomicAdd(&arrived, 1);
  else emulator::wait_until([] { return atomicAdd(&arrived, 0) == 32; });
  emulator::deferred().push_back([=] { out[threadIdx.x] = arrived; });
  __syncthreads();
  emulator::deferred().front()();
}

void check_kernels() {
  const std::vector<float> a = counting(1025), b = counting(1025, 0.5f);
  OnDevice<float> da(a), db(b), dc(1025);
  launch(nullptr, add, 9, 128, 0, da, db, dc, 1025);
  bool ok = true;
  for (size_t i = 0; i < a.size(); ++i) ok &= dc.host()[i] == a[i] + b[i];
  check(ok, "vectors are added");

  OnDevice<double> ds(3 * 256);
  launch(nullptr, sums, 3, 256, 0, da, ds, 1025);
  check(ds.host() == std::vector<double>(3 * 256, 6 * 1024 * 1025 / 2), "a block's sum, in all of its threads");

  OnDevice<float> dt(1025);
  ok = true;
  for (const auto& [rows, columns] : {std::pair{41, 25}, {1, 1025}, {205, 5}}) {
    launch(nullptr, transpose, dim3((columns + 31) / 32, (rows + 31) / 32), dim3(32, 8), 32 * 33 * 4, da, dt, rows, columns);
    const std::vector<float> t = dt.host();
    for (int i = 0; i < rows * columns; ++i) ok &= t[i % columns * rows + i / columns] == a[i];
  }
  check(ok, "a transpose through dynamic shared memory");

  OnDevice<int64_t> dv(64 * 8);
  launch(nullptr, shuffles, 1, 64, 0, dv);
  const std::vector<int64_t> v = dv.host();
  ok = true;
  for (int i = 0; i < 64; ++i) {
    const int lane = i % 32;
    const int64_t want[8] = {105,
                             100 + (lane < 3 ? lane : lane - 3),
                             100 + (lane % 8 < 5 ? lane + 3 : lane),
                             100 + (lane ^ 9),
                             0x49249249,
                             2,
                             lane < 16 ? 102 : 120,
                             i / 32 * 32 + 31};
    for (int k = 0; k < 8; ++k) ok &= v[i * 8 + k] == want[k];
  }
  check(ok, "shuffles, votes and exchanges of a warp and of half a warp");

  OnDevice<int> dw(70);
  launch(nullptr, votes, 1, 100, 0, dw);
  check(dw.host() == std::vector<int>(70, 351), "barriers that count, and do not wait for threads that have exited");

  OnDevice<int> counter(std::vector<int>{0}), last(std::vector<int>{0}), done(std::vector<int>{0});
  OnDevice<float> sum(std::vector<float>{0});
  OnDevice<unsigned> most(std::vector<unsigned>{0});
  launch(nullptr, atomics, 50, 64, 0, counter, sum, most, last, done);
  check(counter.host()[0] == 6400 && sum.host()[0] == 1600 && most.host()[0] == 3199 && last.host()[0] == 6400,
        "atomics, and the last block of a grid");

  OnDevice<unsigned> di(2 * 3 * 5 * 24);
  launch(nullptr, indices, dim3(2, 3, 5), dim3(4, 3, 2), 0, di);
  const std::vector<unsigned> index = di.host();
  ok = true;
  for (unsigned i = 0; i < index.size(); ++i) ok &= index[i] == i / 24 * 1000 + i % 24;
  check(ok, "grids and blocks of three dimensions");

  OnDevice<int> dp(64);
  launch(nullptr, pipeline, 1, 64, 0, dp);
  check(dp.host() == std::vector<int>(64, 32), "threads that wait for a condition, and what they defer");
}

// --- kernels that are wrong -------------------------------------------------------------------------------------------------

__global__ void race(int* out) {  // a barrier is missing
  __shared__ int values[256];
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[blockIdx.x * 256 + threadIdx.x] = values[255 - threadIdx.x];
}
__global__ void unwritten(float* out) {
  __shared__ float fixed[33];
  fixed[32] = 1;  // what is never written at all is zero to the compiler
  out[blockIdx.x * 64 + threadIdx.x] = fixed[threadIdx.x];
  out[blockIdx.x * 64 + 32 + threadIdx.x] = static_cast<float*>(emulator::dynamic_shared())[threadIdx.x];
}
__global__ void missed_barrier(int* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = __shfl_sync(kAll, 1, 0);
  if (threadIdx.x >= 32) emulator::wait_until([] { return false; });
}
__global__ void missed_by_a_collective(int* out) {
  if (threadIdx.x == 7) __syncthreads();
  else out[threadIdx.x] = __shfl_sync(kAll, 1, 0);
}
__global__ void mixed(int* out) { out[threadIdx.x] = threadIdx.x < 9 ? __shfl_sync(kAll, 1, 0) : static_cast<int>(__ballot_sync(kAll, 1)); }
__global__ void exited(int* out) {
  if (threadIdx.x == 31) return;
  out[threadIdx.x] = __shfl_xor_sync(kAll, 1, 1);
}
__global__ void outside(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffu, 1, 16);
}

/// The output of a process that does this, before it aborts.
template <class F>
std::string last_words_of(F&& f) {
  int ends[2];
  if (pipe(ends) != 0) return "no pipe";
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    f();
    _exit(0);
  }
  close(ends[1]);
  std::string said;
  char buffer[512];
  for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) > 0;) said.append(buffer, static_cast<size_t>(n));
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  return WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT ? said : "it did not abort";
}

template <class... Params, class... Args>
std::string last_words(void (*kernel)(Params...), dim3 block, Args... args) {
  return last_words_of([&] {
    launch(nullptr, kernel, 1, block, 0, args...);
    cudaDeviceSynchronize();
  });
}

/// A graph that uses memory which has been freed: the launch succeeds, and from the next wait on everything fails.
void lose_the_device() {
  void *p = nullptr, *q = nullptr;
  cudaStream_t s;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  cudaStreamCreate(&s);
  cudaMalloc(&p, 16);
  cudaStreamBeginCapture(s, cudaStreamCaptureModeRelaxed);
  cudaMemsetAsync(p, 0, 16, s);
  cudaStreamEndCapture(s, &graph);
  cudaGraphInstantiate(&executable, graph);
  cudaFree(p);
  cudaGraphLaunch(executable, s);
  const bool lost = cudaStreamSynchronize(s) == cudaErrorIllegalAddress && cudaMalloc(&q, 16) == cudaErrorIllegalAddress &&
                    cudaGetLastError() == cudaErrorIllegalAddress && cudaGetLastError() == cudaErrorIllegalAddress &&
                    cudaDeviceSynchronize() == cudaErrorIllegalAddress && cudaMemsetAsync(p, 0, 16, s) == cudaErrorIllegalAddress;
  if (lost) emulator::die("and the device is lost");
}

void check_aborts() {  // before the first launch: a child of fork() has no threads but its first
  static int out[64];
  auto check_words = [](const std::string& said, const std::string& want, const char* name) {
    check(said.find(want) != std::string::npos, name, said.find(want) != std::string::npos ? "" : said);
  };
  check_words(last_words(missed_barrier, 64, out), "a condition that nothing brings about", "a wait for nothing ends the process");
  check_words(last_words(missed_by_a_collective, 32, out), "__syncthreads is not reached", "a barrier that lanes do not reach");
  check_words(last_words(mixed, 32, out), "while other lanes of its warp wait for it in", "different collectives in one warp");
  check_words(last_words(exited, 32, out), "__shfl_xor_sync", "a collective with a lane that has exited");
  check_words(last_words(exited, 31, out), "__shfl_xor_sync", "a collective with a lane that the block does not have");
  check_words(last_words(outside, 32, out), "not in its mask", "a shuffle from outside its mask");
  check_words(last_words(missed_by_a_collective, 32, out), "warp 0: lanes ffffff7f wait in __shfl_sync", "and who waits where");
  check_words(last_words_of(lose_the_device), "memory that has been freed\nCUDA emulator: and the device is lost",
              "a graph on memory that has been freed fails, and everything after it");
}

void check_races() {
  OnDevice<int> dr(8 * 256);
  launch(nullptr, race, 8, 256, 0, dr);
  int wrong = 0;
  for (int i = 0; const int v : dr.host()) wrong += v != 255 - i++ % 256;
  check(wrong > 100, "a race shows", std::to_string(wrong) + " of 2048 values are wrong");

  bool garbage = true, nan = false;
  for (int turn = 0; turn < 2; ++turn) {
    OnDevice<float> du(4 * 64);
    for (const float v : du.host()) garbage &= !(std::abs(v) < 1e6f), nan |= std::isnan(v);
    launch(nullptr, unwritten, 4, 32, 128, du);
    for (const float v : du.host()) garbage &= !(std::abs(v) < 1e6f), nan |= std::isnan(v);
  }
  check(garbage && nan, "memory that nothing was written to holds garbage");
}

// --- the runtime ------------------------------------------------------------------------------------------------------------

void check_copies() {
  const std::vector<float> a = counting(60);
  OnDevice<float> d(a), e(60);
  float* p = d;
  std::vector<float> back(60, -1);
  cudaStream_t s;
  cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking);
  cudaMemsetAsync(e, 0, 240, s);
  cudaMemcpy2DAsync(e, 40, d, 24, 20, 5, cudaMemcpyDeviceToDevice, s);  // 5 rows of 5 floats, of 6 into 10
  cudaMemcpyAsync(back.data(), e, 240, cudaMemcpyDeviceToHost, s);
  bool ok = cudaStreamSynchronize(s) == cudaSuccess;
  for (int i = 0; i < 60; ++i) ok &= back[i] == (i / 10 < 5 && i % 10 < 5 ? static_cast<float>(i / 10 * 6 + i % 10) : 0.0f);
  check(ok, "copies of bytes and of rows");
  check(cudaMemcpyAsync(p + 1, a.data(), 240, cudaMemcpyHostToDevice, s) == cudaErrorInvalidValue &&
            cudaMemcpyAsync(back.data(), a.data(), 4, cudaMemcpyDeviceToHost, s) == cudaErrorInvalidValue &&
            cudaMemcpyAsync(p, e, 4, cudaMemcpyHostToDevice, s) == cudaErrorInvalidValue &&
            cudaMemcpy2DAsync(p, 8, e, 8, 12, 2, cudaMemcpyDeviceToDevice, s) == cudaErrorInvalidPitchValue &&
            cudaMemsetAsync(p + 60, 0, 1, s) == cudaErrorInvalidValue && cudaGetLastError() == cudaErrorInvalidValue &&
            cudaGetLastError() == cudaSuccess,
        "copies past the end and in the wrong direction are refused");
  cudaStreamDestroy(s);
}

void check_memory() {
  size_t free = 0, total = 0, free_then = 0;
  void *p = nullptr, *q = nullptr;
  emulator::set_total_memory(1 << 20);
  cudaMemGetInfo(&free, &total);
  const bool fits = cudaMalloc(&p, 1 << 20) == cudaSuccess, full = cudaMalloc(&q, 1) == cudaErrorMemoryAllocation && !q;
  cudaMemGetInfo(&free_then, &total);
  cudaGetLastError();
  check(fits && full && free == 1 << 20 && free_then == 0 && cudaFree(p) == cudaSuccess && cudaMalloc(&q, 1) == cudaSuccess,
        "out of memory, and memory again");
  check(cudaFreeHost(q) == cudaErrorInvalidValue && cudaFree(q) == cudaSuccess && cudaFree(q) == cudaErrorInvalidValue,
        "memory is freed once, and as what it is");
  cudaGetLastError();
  emulator::set_total_memory(1 << 30);
}

void check_launches() {
  auto status_of = [](dim3 grid, dim3 block, size_t shared_bytes) {
    launch(nullptr, unwritten, grid, block, shared_bytes, static_cast<float*>(nullptr));
    return cudaGetLastError();
  };
  check(status_of(1, 1025, 0) == cudaErrorInvalidConfiguration && status_of(dim3(1, 65536), 32, 0) == cudaErrorInvalidConfiguration &&
            status_of(0, 32, 0) == cudaErrorInvalidConfiguration,
        "blocks and grids that are too large are refused");
  OnDevice<float> du(64);
  const bool refused = status_of(1, 32, 100 << 10) == cudaErrorInvalidValue;
  cudaFuncSetAttribute(unwritten, cudaFuncAttributeMaxDynamicSharedMemorySize, 100 << 10);
  launch(nullptr, unwritten, 1, 32, 100 << 10, du);
  check(refused && cudaGetLastError() == cudaSuccess &&
            cudaFuncSetAttribute(unwritten, cudaFuncAttributeMaxDynamicSharedMemorySize, 228 << 10) != cudaSuccess,
        "much shared memory is asked for first");
  cudaGetLastError();
}

void check_graphs() {
  OnDevice<float> a(counting(64)), b(counting(64, 1)), c(std::vector<float>(64, 0));
  cudaStream_t s, side;
  cudaEvent_t fork, join;
  cudaStreamCreate(&s), cudaStreamCreate(&side), cudaEventCreate(&fork), cudaEventCreate(&join);
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  static int calls = 0;
  cudaStreamBeginCapture(s, cudaStreamCaptureModeRelaxed);
  launch(s, add, 1, 64, 0, a, b, c, 64);
  cudaEventRecord(fork, s);
  cudaStreamWaitEvent(side, fork);
  cudaMemcpyAsync(a, c, 256, cudaMemcpyDeviceToDevice, side);
  cudaLaunchHostFunc(side, [](void* n) { ++*static_cast<int*>(n); }, &calls);
  cudaEventRecord(join, side);
  cudaStreamWaitEvent(s, join);
  bool ok = calls == 0 && c.host()[3] == 0 && cudaStreamEndCapture(s, &graph) == cudaSuccess &&
            cudaGraphInstantiate(&executable, graph, 0) == cudaSuccess;
  cudaGraphDestroy(graph);
  for (int i = 0; i < 3; ++i) ok &= cudaGraphLaunch(executable, s) == cudaSuccess;
  ok &= cudaStreamSynchronize(s) == cudaSuccess && cudaStreamSynchronize(side) == cudaSuccess;
  check(ok && calls == 3 && c.host()[3] == 3 + 3 * 4, "a graph of two streams, launched three times");
  cudaGraphExecDestroy(executable);

  cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal);
  void* p = nullptr;
  const bool refused = cudaMalloc(&p, 16) == cudaErrorStreamCaptureUnsupported;
  check(refused && cudaStreamEndCapture(s, &graph) == cudaErrorStreamCaptureInvalidated && !graph, "a strict capture refuses to allocate");
  cudaStreamBeginCapture(s, cudaStreamCaptureModeRelaxed);
  const bool may = cudaMalloc(&p, 16) == cudaSuccess, may_not = cudaStreamSynchronize(s) == cudaErrorStreamCaptureUnsupported;
  check(may && may_not && cudaStreamEndCapture(s, &graph) == cudaErrorStreamCaptureInvalidated, "a relaxed one refuses to be waited for");
  cudaFree(p);
  cudaGetLastError();
  float ms = -1;
  check(cudaEventRecord(fork, s) == cudaSuccess && cudaEventRecord(join, s) == cudaSuccess && cudaEventSynchronize(join) == cudaSuccess &&
            cudaEventQuery(join) == cudaSuccess && cudaEventElapsedTime(&ms, fork, join) == cudaSuccess && ms == 0,
        "events and the time between them");
  cudaStreamDestroy(s), cudaStreamDestroy(side), cudaEventDestroy(fork), cudaEventDestroy(join);
}

void check_threads() {
  std::vector<std::thread> threads;
  std::atomic<int> right = 0;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&right, t] {
      for (int i = 0; i < 20; ++i) {
        const float base = static_cast<float>(t * 100 + i);
        OnDevice<float> a(counting(100, base)), b(counting(100)), c(100);
        launch(nullptr, add, 2, 64, 0, a, b, c, 100);
        right += c.host()[99] == base + 198;
      }
    });
  for (std::thread& t : threads) t.join();
  check(right == 80, "four threads of the host at once");
}

// --- streams, each in its own time ----------------------------------------------------------------------------------------

constexpr int kTries = 40;  // of what goes wrong by chance

class Stream {
 public:
  explicit Stream(unsigned flags = cudaStreamNonBlocking) { cudaStreamCreateWithFlags(&s_, flags); }
  ~Stream() { cudaStreamSynchronize(s_), cudaStreamDestroy(s_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  operator cudaStream_t() const { return s_; }
  bool wait() const { return cudaStreamSynchronize(s_) == cudaSuccess; }

 private:
  cudaStream_t s_ = nullptr;
};

class Event {
 public:
  Event() { cudaEventCreate(&e_); }
  ~Event() { cudaEventDestroy(e_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  operator cudaEvent_t() const { return e_; }

 private:
  cudaEvent_t e_ = nullptr;
};

/// Page-locked.
class Staging {
 public:
  Staging() { cudaMallocHost(&p_, 64); }
  ~Staging() { cudaFreeHost(p_); }
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;
  operator int*() const { return p_; }

 private:
  int* p_ = nullptr;
};

__global__ void increment(int* p) { ++*p; }
__global__ void fill(int* p, int value) { p[threadIdx.x] = value; }

/// Holds up a stream until it is opened.
class Gate {
 public:
  explicit Gate(cudaStream_t s) {
    cudaLaunchHostFunc(s, [](void* open) { static_cast<std::atomic<bool>*>(open)->wait(false); }, &open_);
  }
  ~Gate() { open(); }
  void open() { open_ = true, open_.notify_all(); }

 private:
  std::atomic<bool> open_ = false;
};

/// How often a stream reads something else than what another wrote before.
int wrong_reads(bool waits) {
  Stream writer, reader;
  Event written;
  OnDevice<int> d(16);
  Staging out;
  int wrong = 0;
  for (int i = 0; i < kTries; ++i) {
    launch(writer, fill, 1, 16, 0, d, i);
    cudaEventRecord(written, writer);
    if (waits) cudaStreamWaitEvent(reader, written);
    cudaMemcpyAsync(out, d, 64, cudaMemcpyDeviceToHost, reader);
    reader.wait();
    wrong += out[15] != i;
    writer.wait();
  }
  return wrong;
}

/// How often a copy finds what was written to its source after the call.
int wrong_uploads(bool page_locked, bool waits) {
  Stream s;
  Event copied;
  Staging staging, out;
  std::vector<int> pageable(16);
  int* from = page_locked ? staging : pageable.data();
  OnDevice<int> d(16);
  int wrong = 0;
  for (int i = 0; i < kTries; ++i) {
    from[0] = i;
    cudaMemcpyAsync(d, from, 64, cudaMemcpyHostToDevice, s);
    cudaEventRecord(copied, s);
    if (waits) cudaEventSynchronize(copied);
    from[0] = -1;
    cudaMemcpyAsync(out, d, 64, cudaMemcpyDeviceToHost, s);
    s.wait();
    wrong += out[0] != i;
  }
  return wrong;
}

void check_order() {
  auto times = [](int n) { return std::to_string(n) + " of " + std::to_string(kTries); };
  int wrong = 0;
#if !defined(__SANITIZE_THREAD__)  // which says so too, and ends the process
  wrong = wrong_reads(false);
  check(wrong > 0, "a wait for another stream that is missing shows", times(wrong));
  wrong = wrong_uploads(true, false);
  check(wrong > 0, "page-locked memory that is used again too early shows", times(wrong));
#endif
  wrong = wrong_reads(true);
  check(wrong == 0, "one that is there holds", times(wrong));
  wrong = wrong_uploads(true, true) + wrong_uploads(false, false);
  check(wrong == 0, "used again in time, it does not; and other memory is read at the call", times(wrong));

  // A chain through two streams and a graph, and the default stream among streams that it takes turns with.
  Stream a, b, blocking(cudaStreamDefault), capturing;
  Event to_a, to_b;
  OnDevice<int> d(std::vector<int>(16, 0));
  Staging out;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  cudaStreamBeginCapture(capturing, cudaStreamCaptureModeRelaxed);
  for (int i = 0; i < 3; ++i) launch(capturing, increment, 1, 1, 0, d);
  cudaMemcpyAsync(out, d, 64, cudaMemcpyDeviceToHost, capturing);
  cudaStreamEndCapture(capturing, &graph);
  cudaGraphInstantiate(&executable, graph);
  bool ok = true;
  for (int i = 0; i < 10; ++i) {
    launch(a, increment, 1, 1, 0, d);
    cudaEventRecord(to_b, a), cudaStreamWaitEvent(b, to_b);
    cudaGraphLaunch(executable, b);
    cudaEventRecord(to_a, b), cudaStreamWaitEvent(a, to_a);
    if (i % 3 == 0) ok &= cudaEventSynchronize(to_a) == cudaSuccess && out[0] == 4 * (i + 1);
  }
  cudaGraphExecDestroy(executable), cudaGraphDestroy(graph);  // may still be in use
  check(a.wait() && ok && out[0] == 40 && d.host()[0] == 40, "a chain of kernels and graphs through two streams");

  cudaMemset(d, 0, 64);
  for (int i = 0; i < 20; ++i) launch(i % 2 ? static_cast<cudaStream_t>(blocking) : nullptr, increment, 1, 1, 0, d);
  check(d.host()[0] == 20, "blocking streams take turns with the default stream");
}

void check_time() {
  Stream s, other;
  Event begin, middle, end, elsewhere;
  OnDevice<int> d(std::vector<int>(16, 0)), e(16);
  float first = 0, second = 0, across = 0;
  void* more = nullptr;
  Gate gate(s);
  cudaEventRecord(begin, s);
  for (int i = 0; i < 3; ++i) launch(s, increment, 1, 1, 0, d);
  cudaEventRecord(middle, s);
  cudaMemsetAsync(d, 0, 64, s);
  cudaEventRecord(end, s);
  cudaStreamWaitEvent(other, middle);
  cudaMemsetAsync(e, 0, 64, other);
  cudaEventRecord(elsewhere, other);
  check(cudaEventQuery(begin) == cudaErrorNotReady && cudaStreamQuery(s) == cudaErrorNotReady &&
            cudaStreamQuery(other) == cudaErrorNotReady && cudaEventElapsedTime(&first, begin, middle) == cudaErrorNotReady,
        "a stream that is held up, and one that waits for it, are not ready");
  check(cudaMalloc(&more, 64) == cudaSuccess && cudaStreamQuery(s) == cudaErrorNotReady, "to allocate does not wait");
  std::atomic<bool> freed = false;
  std::thread frees([&] { freed = cudaFree(more) == cudaSuccess; });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  const bool early = freed;
  gate.open();
  frees.join();
  check(!early && freed && cudaStreamQuery(s) == cudaSuccess && cudaStreamQuery(other) == cudaSuccess, "to free waits for all streams");
  check(cudaEventElapsedTime(&first, begin, middle) == cudaSuccess && cudaEventElapsedTime(&second, begin, end) == cudaSuccess &&
            cudaEventElapsedTime(&across, begin, elsewhere) == cudaSuccess && first == 3e-3f && second == 4e-3f && across == 4e-3f,
        "the time between events counts pieces of work");
  cudaGetLastError();
}

// --- cuBLASLt ---------------------------------------------------------------------------------------------------------------

template <class Function>
Function* symbol(const char* name) {
  return reinterpret_cast<Function*>(emulator::cublaslt_symbol(name));
}

/// out [n, m] in C order = a [n, k] b [m, k]^T (+ bias [m]), of float32 or e4m3; the status of what failed.
int product(const void* a, const void* b, const float* bias, float* out, int64_t n, int64_t m, int64_t k, int type, int64_t leading) {
  void *operation = nullptr, *layout_a = nullptr, *layout_b = nullptr, *layout_d = nullptr, *preference = nullptr;
  auto make = symbol<int(void**, int, uint64_t, uint64_t, int64_t)>("cublasLtMatrixLayoutCreate");
  auto set = symbol<int(void*, int, const void*, size_t)>("cublasLtMatmulDescSetAttribute");
  symbol<int(void**, int, int)>("cublasLtMatmulDescCreate")(&operation, 68, 0);
  make(&layout_a, type, k, m, leading), make(&layout_b, type, k, n, k), make(&layout_d, 0, m, n, m);
  const int yes = 1;
  const uint32_t epilogue = 4;
  set(operation, 3, &yes, 4);
  if (bias) set(operation, 7, &epilogue, 4), set(operation, 8, &bias, 8);
  symbol<int(void**)>("cublasLtMatmulPreferenceCreate")(&preference);
  struct {
    uint64_t algorithm[8];
    size_t workspace;
    int status;
    float waves;
    int reserved[4];
  } found[4];
  int count = 0;
  int status = symbol<int(void*, void*, void*, void*, void*, void*, void*, int, void*, int*)>("cublasLtMatmulAlgoGetHeuristic")(
      nullptr, operation, layout_a, layout_b, layout_d, layout_d, preference, 4, found, &count);
  const float one = 1, zero = 0;
  if (status == 0)
    status = symbol<int(void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*, void*, void*, void*,
                        const void*, void*, size_t, void*)>("cublasLtMatmul")(
        nullptr, operation, &one, b, layout_a, a, layout_b, &zero, out, layout_d, out, layout_d, found[0].algorithm, nullptr, 0, nullptr);
  for (void* l : {layout_a, layout_b, layout_d}) symbol<int(void*)>("cublasLtMatrixLayoutDestroy")(l);
  symbol<int(void*)>("cublasLtMatmulDescDestroy")(operation);
  symbol<int(void*)>("cublasLtMatmulPreferenceDestroy")(preference);
  return status;
}

void check_cublaslt() {
  constexpr int n = 7, m = 17, k = 33;
  const std::vector<float> a = uniflow::test::normal(n * k, 1), b = uniflow::test::normal(m * k, 2), bias = uniflow::test::normal(m, 3);
  OnDevice<float> da(a), db(b), dbias(bias), dout(n * m);
  bool ok = product(da, db, dbias, dout, n, m, k, 0, k) == 0;
  const std::vector<float> out = dout.host();
  double error = 0;
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < m; ++j) {
      double want = bias[j];
      for (int x = 0; x < k; ++x) want += double{a[i * k + x]} * b[j * k + x];
      error = std::max(error, std::abs(out[i * m + j] - want));
    }
  check(ok && error < 1e-5, "cuBLASLt: a product with bias", uniflow::test::text("error %.1e", error));
  check(product(da, db, nullptr, dout, n, m, k, 0, k - 1) == 7, "a leading dimension that is too small is refused");

  std::vector<uint8_t> a8(2 * 16), b8(16 * 16);
  for (size_t i = 0; i < a8.size(); ++i) a8[i] = i % 2 ? 0x38 : 0xc4;                          // 1 and -3
  for (size_t i = 0; i < b8.size(); ++i) b8[i] = i % 16 == 0 ? 0x01 : i % 16 == 1 ? 0x7e : 0;  // 2^-9 and 448
  OnDevice<uint8_t> da8(a8), db8(b8);
  OnDevice<float> d8(2 * 16);
  ok = product(da8, db8, nullptr, d8, 2, 16, 16, 28, 16) == 0;
  check(ok && d8.host() == std::vector<float>(32, 448 - 3 * 0x1p-9f), "cuBLASLt: a product of e4m3");
  check(product(da8, db8, nullptr, d8, 2, 8, 16, 28, 16) == 7, "e4m3 of odd sizes is refused");
}

}  // namespace

int main() {
  cudaSetDevice(0);
  check_aborts();
  check_kernels();
  check_races();
  check_copies();
  check_memory();
  check_launches();
  check_graphs();
  check_threads();
  if (const char* at_once = std::getenv("UNIFLOW_EMULATOR_SYNC"); !at_once || *at_once == '0') {
    check_order();
    check_time();
  }
  check_cublaslt();
  std::printf("%d passed, %d failed\n", uniflow::test::passed, uniflow::test::failed);
  return uniflow::test::failed == 0 ? 0 : 1;
}
