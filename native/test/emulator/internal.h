/// Shared by the parts of the emulator.
#pragma once

#include <utility>

#include <cuda_runtime.h>

namespace emulator {

struct Random {
  uint64_t state;
  uint64_t next() {  // splitmix64
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  uint32_t below(uint32_t n) { return static_cast<uint32_t>((next() >> 32) * n >> 32); }
  template <class T>
  void shuffle(T* values, size_t n) {
    for (size_t i = n; i > 1; --i) std::swap(values[i - 1], values[below(static_cast<uint32_t>(i))]);
  }
};

/// Environment variable UNIFLOW_EMULATOR_SEED, or 1.
uint64_t seed();

/// Fill bytes of fresh memory: 0xcb, large negative numbers, and 0xff, NaN, in turn.
unsigned char garbage(uint64_t turn);

/// Runs all blocks of a grid. One grid at a time: other threads of the host wait.
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread_body);

/// Gives the stream work to run; or records it, where the stream is being captured.
cudaError_t submit(cudaStream_t stream, std::function<void()> work);

// --- queues: the work of streams, see queue.cpp -----------------------------------------------------------------------------

class Queue;

/// A point in a queue's work. One without a queue has always been reached.
struct Mark {
  std::shared_ptr<Queue> queue{};
  uint64_t number = 0;  // of pieces before it
  uint64_t clock = 0;   // of the queue by then
};

/// A blocking queue takes turns with the default stream's.
std::shared_ptr<Queue> open_queue(bool blocking);
/// It still runs what it has been given.
void close_queue(Queue& queue);
/// The default stream's.
const std::shared_ptr<Queue>& default_queue();

void append(const std::shared_ptr<Queue>& queue, std::function<void()> work);
/// The next work given to the queue waits for the mark.
void append_wait(const std::shared_ptr<Queue>& queue, const Mark& mark);
/// After all that the queue has been given.
Mark mark(const std::shared_ptr<Queue>& queue);

bool reached(const Mark& mark);
void wait_for(const Mark& mark);
/// For all that all queues have been given so far.
void wait_for_all();

/// Work went wrong: none runs any more, and every call reports it.
void fail(cudaError_t status, const char* message);
/// The first that went wrong, or cudaSuccess.
cudaError_t failure();

}  // namespace emulator
