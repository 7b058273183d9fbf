/// Grids, blocks and the threads of a block. Blocks are run by a few threads of the host, of the emulator's own; the threads of a block
/// are fibers of one of them. A fiber runs one thread of the block after the other, and only leaves its stack to another when
/// its thread waits: a kernel without barriers needs one fiber.
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <condition_variable>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <thread>

#include "native/test/emulator/internal.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

constinit thread_local uint3 threadIdx{}, blockIdx{};
constinit thread_local dim3 blockDim, gridDim;

namespace emulator {
namespace {

// --- fibers -----------------------------------------------------------------------------------------------------------------

constexpr size_t kStack = 256 << 10, kPage = 4096;

struct Fiber {
#if defined(__x86_64__)
  void* at = nullptr;  // its stack pointer, while it does not run
#else
  ucontext_t at{};
#endif
  std::byte* stack = nullptr;  // none: the stack of the host's thread
  size_t size = 0;
  void* fake_stack = nullptr;  // of the address sanitizer
  void* tsan = nullptr;
};

#if defined(__x86_64__)
// Pushes what a function must preserve, changes stacks, pops, and returns to where that stack left off.
extern "C" void uniflow_emulator_switch(void** from, void* to);
asm(R"(
  .text
  .type uniflow_emulator_switch, @function
uniflow_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size uniflow_emulator_switch, .-uniflow_emulator_switch
)");
#endif

void fiber_main();

std::unique_ptr<Fiber> make_fiber(size_t number) {
  auto f = std::make_unique<Fiber>();
  void* memory = mmap(nullptr, kPage + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) die("no memory for the stack of a thread");
  mprotect(memory, kPage, PROT_NONE);  // an overflow ends the process
  f->stack = static_cast<std::byte*>(memory) + kPage;
  f->size = kStack - number % 16 * 256;  // or the same variable of all threads would share a cache line
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(f->stack + f->size);
  *--top = nullptr;  // the end for debuggers, and the alignment that a function finds
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f->at = top;
#else
  getcontext(&f->at);
  f->at.uc_stack.ss_sp = f->stack;
  f->at.uc_stack.ss_size = f->size;
  makecontext(&f->at, &fiber_main, 0);
#endif
#if defined(__SANITIZE_THREAD__)
  f->tsan = __tsan_create_fiber(0);
#endif
  return f;
}

/// First thing on the stack that a switch has come to.
void arrive([[maybe_unused]] Fiber& here, [[maybe_unused]] Fiber& host) {
#if defined(__SANITIZE_ADDRESS__)
  const void* stack;
  size_t size;
  __sanitizer_finish_switch_fiber(here.fake_stack, &stack, &size);
  if (host.size == 0)
    host.stack = static_cast<std::byte*>(const_cast<void*>(stack)), host.size = size;  // the first switch leaves the host's
#endif
}

void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] Fiber& host) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.size);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.tsan, 0);
#endif
#if defined(__x86_64__)
  uniflow_emulator_switch(&from.at, to.at);
#else
  swapcontext(&from.at, &to.at);
#endif
  arrive(from, host);
}

// --- blocks -----------------------------------------------------------------------------------------------------------------

const char* name_of(Collective kind) {
  constexpr const char* names[] = {"__syncwarp",    "__shfl_sync", "__shfl_up_sync", "__shfl_down_sync",       "__shfl_xor_sync",
                                   "__ballot_sync", "__any_sync",  "__all_sync",     "an exchange of the warp"};
  return names[static_cast<int>(kind)];
}
const char* name_of(Barrier kind) {
  constexpr const char* names[] = {"__syncthreads", "__syncthreads_or", "__syncthreads_and", "__syncthreads_count"};
  return names[static_cast<int>(kind)];
}

/// One collective of some lanes of a warp, from the first one's arrival until the last has read it.
struct Meeting {
  Collective kind;
  unsigned mask, arrived;
  int readers;
  size_t bytes;
  struct alignas(64) Line {
    std::byte bytes[64];
  };
  std::vector<Line> values;
};

enum class State : uint8_t { Ready, AtBarrier, AtMeeting, Exited };

struct Thread {
  uint3 index;
  State state = State::Ready;
  Fiber* fiber = nullptr;      // none: not yet begun
  Meeting* meeting = nullptr;  // its last one
  std::vector<std::function<void()>> deferred;
};

struct Warp {
  unsigned lanes;                  // that have not exited
  std::vector<Meeting*> meetings;  // that wait for lanes
};

struct Grid {
  dim3 grid, block;
  size_t shared_bytes;
  const std::function<void()>* body;
  uint64_t number, blocks, first, stride;  // blocks are begun in the order first + i * stride
  unsigned char fill;
  std::atomic<uint64_t> next{0};
};

struct Span {
  void* data = nullptr;
  size_t bytes = 0;
};

/// Runs blocks, one at a time, on its thread of the host.
class Runner {
 public:
  void run(Grid& grid);
  void fiber_main();

  int barrier(Barrier kind, bool predicate);
  const void* collective(Collective kind, unsigned mask, const void* mine, size_t bytes);
  void yield();
  int lane() const { return running_ % 32; }
  void* shared() const { return shared_.get(); }
  std::vector<std::function<void()>>& deferred() { return threads_[static_cast<size_t>(running_)].deferred; }
  void describe() const;

 private:
  void run_block(uint64_t number);
  void enqueue(std::vector<int>& threads);
  void suspend();
  Fiber& next_fiber();
  bool next_here(Fiber& fiber);
  void start(int thread);
  void exit_thread();
  void open_barrier();
  void leave(Thread& t);
  [[noreturn]] void die_waiting();

  Grid* grid_ = nullptr;
  const std::function<void()>* body_ = nullptr;
  Random random_{0};
  Span statics_;  // this thread's static shared memory
  Fiber host_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> idle_;
  std::vector<std::unique_ptr<Meeting>> meetings_;
  std::vector<Meeting*> idle_meetings_;
  std::unique_ptr<void, decltype(&std::free)> shared_{nullptr, &std::free};

  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<int> queue_;  // a ring of the threads that can run
  size_t head_ = 0, queued_ = 0;
  std::vector<int> woken_;  // scratch
  int running_ = -1, exited_ = 0, arrived_ = 0, predicates_ = 0, opened_arrived_ = 0, opened_predicates_ = 0;
  int64_t idle_yields_ = 0;
  Barrier barrier_ = Barrier::Sync;
};

constinit thread_local Runner* runner = nullptr;

void fiber_main() { runner->fiber_main(); }

/// This module's thread-local variables of this thread: all that is __shared__, and a few of the emulator's own.
Span thread_locals() {
  Span found;
  dl_iterate_phdr(
      [](dl_phdr_info* module, size_t, void* out) {
        for (int i = 0; i < module->dlpi_phnum; ++i) {
          const auto begin = reinterpret_cast<uintptr_t>(module->dlpi_tls_data), own = reinterpret_cast<uintptr_t>(&runner);
          const size_t bytes = module->dlpi_phdr[i].p_memsz;
          if (module->dlpi_phdr[i].p_type != PT_TLS || own < begin || own >= begin + bytes) continue;
          *static_cast<Span*>(out) = {module->dlpi_tls_data, bytes};
          return 1;
        }
        return 0;
      },
      &found);
  return found;
}

void Runner::run(Grid& grid) {
  grid_ = &grid;
  body_ = grid.body;
  if (!statics_.data) statics_ = thread_locals();
#if defined(__SANITIZE_THREAD__)
  host_.tsan = __tsan_get_current_fiber();
#endif
  void* memory = nullptr;
  if (posix_memalign(&memory, 1024, std::max<size_t>(grid.shared_bytes, 1)) != 0)
    die("no memory for %zu bytes of shared memory", grid.shared_bytes);
  shared_.reset(memory);
  for (uint64_t i; (i = grid.next++) < grid.blocks;) run_block((grid.first + i * grid.stride) % grid.blocks);
  shared_.reset();
}

void Runner::run_block(uint64_t number) {
  if (statics_.data) std::memset(statics_.data, grid_->fill, statics_.bytes);
  runner = this;  // was among them, as were threadIdx and its like
  std::memset(shared_.get(), grid_->fill, grid_->shared_bytes);

  const dim3 g = grid_->grid, b = grid_->block;
  gridDim = g;
  blockDim = b;
  blockIdx = {static_cast<unsigned>(number % g.x), static_cast<unsigned>(number / g.x % g.y), static_cast<unsigned>(number / g.x / g.y)};
  random_ = {grid_->number * 0x2545f4914f6cdd1du + number};
  const int n = static_cast<int>(b.x * b.y * b.z);
  threads_.resize(static_cast<size_t>(n));
  warps_.resize(static_cast<size_t>(n + 31) / 32);
  queue_.resize(static_cast<size_t>(n));
  for (int i = 0; i < n; ++i) {
    Thread& t = threads_[static_cast<size_t>(i)];
    const unsigned u = static_cast<unsigned>(i);
    t.index = {u % b.x, u / b.x % b.y, u / b.x / b.y};
    t.state = State::Ready;
    t.fiber = nullptr;
    t.deferred.clear();
  }
  for (size_t w = 0; w < warps_.size(); ++w) warps_[w].lanes = n - static_cast<int>(w) * 32 >= 32 ? ~0u : (1u << n % 32) - 1;
  exited_ = arrived_ = predicates_ = 0;
  head_ = queued_ = 0;
  idle_yields_ = 0;
  woken_.clear();
  for (int i = 0; i < n; ++i) woken_.push_back(i);
  enqueue(woken_);
  running_ = -1;
  Fiber& first = next_fiber();
  switch_fiber(host_, first, host_);  // comes back when no thread can run
  running_ = -1;
  if (exited_ < n) die_waiting();
}

/// Threads of one or several warps, in their order before and in a random one after: warp by warp, or now and then all mixed.
void Runner::enqueue(std::vector<int>& threads) {
  if (random_.below(4) == 0) {
    random_.shuffle(threads.data(), threads.size());
  } else {
    for (size_t end = threads.size(), begin; end > 0; end = begin) {
      begin = (end - 1) / 32 * 32;
      const size_t other = random_.below(static_cast<uint32_t>(begin / 32 + 1)) * 32;
      if (end - begin == 32 && other != begin) std::swap_ranges(&threads[begin], &threads[begin] + 32, &threads[other]);
      random_.shuffle(&threads[begin], end - begin);
    }
  }
  const bool in_front = random_.below(2) == 0;
  for (int t : threads) {
    threads_[static_cast<size_t>(t)].state = State::Ready;
    if (in_front) head_ = (head_ + queue_.size() - 1) % queue_.size();
    queue_[in_front ? head_ : (head_ + queued_) % queue_.size()] = t;
    ++queued_;
  }
  threads.clear();
}

void Runner::start(int thread) {
  running_ = thread;
  threadIdx = threads_[static_cast<size_t>(thread)].index;
}

/// Takes the next thread that can run, and returns the fiber to switch to: that thread's, or the host's if there is none.
Fiber& Runner::next_fiber() {
  if (queued_ == 0) return host_;
  const int next = queue_[head_];
  if (++head_ == queue_.size()) head_ = 0;
  --queued_;
  start(next);
  Thread& t = threads_[static_cast<size_t>(next)];
  if (t.fiber) return *t.fiber;
  if (idle_.empty()) {
    fibers_.push_back(make_fiber(fibers_.size()));
    idle_.push_back(fibers_.back().get());
  }
  t.fiber = idle_.back();
  idle_.pop_back();
  return *t.fiber;
}

/// Whether a thread that has not begun is next; it then runs on this fiber, whose own has exited.
bool Runner::next_here(Fiber& fiber) {
  if (queued_ == 0 || threads_[static_cast<size_t>(queue_[head_])].fiber) return false;
  idle_.push_back(&fiber);
  next_fiber();
  return true;
}

void Runner::fiber_main() {
  Fiber& self = *threads_[static_cast<size_t>(running_)].fiber;
  arrive(self, host_);
  for (;;) {
    (*body_)();
    exit_thread();
    if (next_here(self)) continue;
    idle_.push_back(&self);
    Fiber& to = next_fiber();  // not this one: what is next has begun elsewhere
    switch_fiber(self, to, host_);
  }
}

void Runner::suspend() {
  Fiber& self = *threads_[static_cast<size_t>(running_)].fiber;
  Fiber& to = next_fiber();
  if (&to != &self) switch_fiber(self, to, host_);
}

void Runner::exit_thread() {
  Thread& t = threads_[static_cast<size_t>(running_)];
  Warp& w = warps_[static_cast<size_t>(running_ / 32)];
  const unsigned bit = 1u << lane();
  for (const Meeting* m : w.meetings)
    if (m->mask & bit) die("it exits, while other lanes of its warp wait for it in %s(%08x)", name_of(m->kind), m->mask);
  leave(t);
  w.lanes &= ~bit;
  t.state = State::Exited;
  idle_yields_ = 0;
  ++exited_;
  if (arrived_ > 0 && arrived_ + exited_ == static_cast<int>(threads_.size())) open_barrier();
}

int Runner::barrier(Barrier kind, bool predicate) {
  if (arrived_ == 0) barrier_ = kind;
  else if (barrier_ != kind) die("it arrives at %s, while other threads wait in %s", name_of(kind), name_of(barrier_));
  ++arrived_;
  predicates_ += predicate;
  threads_[static_cast<size_t>(running_)].state = State::AtBarrier;
  idle_yields_ = 0;
  if (arrived_ + exited_ == static_cast<int>(threads_.size())) open_barrier();
  suspend();
  switch (kind) {
    case Barrier::Sync:
      return 0;
    case Barrier::Or:
      return opened_predicates_ > 0;
    case Barrier::And:
      return opened_predicates_ == opened_arrived_;
    case Barrier::Count:
      return opened_predicates_;
  }
  return 0;
}

void Runner::open_barrier() {
  opened_arrived_ = arrived_;  // read before the next one opens: all threads must arrive there first
  opened_predicates_ = predicates_;
  arrived_ = predicates_ = 0;
  woken_.clear();
  for (size_t i = 0; i < threads_.size(); ++i)
    if (threads_[i].state == State::AtBarrier) woken_.push_back(static_cast<int>(i));
  enqueue(woken_);
}

/// The thread has read its last meeting.
void Runner::leave(Thread& t) {
  if (t.meeting && --t.meeting->readers == 0) idle_meetings_.push_back(t.meeting);
  t.meeting = nullptr;
}

const void* Runner::collective(Collective kind, unsigned mask, const void* mine, size_t bytes) {
  Thread& t = threads_[static_cast<size_t>(running_)];
  Warp& w = warps_[static_cast<size_t>(running_ / 32)];
  const int lane = running_ % 32;
  if ((mask >> lane & 1) == 0) die("it calls %s(%08x), but is not in that mask", name_of(kind), mask);
  if (mask & ~w.lanes)
    die("it calls %s(%08x), but of these lanes there are %08x: the others have exited, or the block has no such threads", name_of(kind),
        mask, mask & w.lanes);
  leave(t);
  const unsigned bit = 1u << lane;
  auto at = w.meetings.end();
  for (auto m = w.meetings.begin(); m != w.meetings.end(); ++m) {
    const Meeting& other = **m;
    if (other.kind == kind && other.mask == mask && other.bytes == bytes) at = m;
    else if ((other.mask & bit) && (other.arrived & mask))  // each waits for the other
      die("it calls %s(%08x) of %zu bytes, while other lanes of its warp wait for it in %s(%08x) of %zu bytes", name_of(kind), mask, bytes,
          name_of(other.kind), other.mask, other.bytes);
  }
  if (at == w.meetings.end()) {
    if (idle_meetings_.empty()) {
      meetings_.push_back(std::make_unique<Meeting>());
      idle_meetings_.push_back(meetings_.back().get());
    }
    Meeting* m = idle_meetings_.back();
    idle_meetings_.pop_back();
    m->kind = kind, m->mask = mask, m->arrived = 0, m->readers = std::popcount(mask), m->bytes = bytes;
    m->values.resize((bytes * 32 + 63) / 64);
    at = w.meetings.insert(w.meetings.end(), m);
  }
  Meeting& m = **at;
  std::memcpy(m.values[0].bytes + static_cast<size_t>(lane) * bytes, mine, bytes);
  m.arrived |= bit;
  t.meeting = &m;
  t.state = State::AtMeeting;
  idle_yields_ = 0;
  if (m.arrived == mask) {
    w.meetings.erase(at);
    woken_.clear();
    for (int l = 0; l < 32; ++l)
      if (mask >> l & 1) woken_.push_back(running_ - lane + l);
    enqueue(woken_);
  }
  suspend();
  return m.values[0].bytes;
}

void Runner::yield() {
  if (++idle_yields_ > 1000 * static_cast<int64_t>(threads_.size())) die("it waits for a condition that nothing brings about");
  queue_[(head_ + queued_++) % queue_.size()] = running_;
  suspend();
}

void Runner::describe() const {
  if (!grid_) return;
  const dim3 b = grid_->block;
  std::fprintf(stderr, "  in block (%u, %u, %u) of %u x %u x %u threads", blockIdx.x, blockIdx.y, blockIdx.z, b.x, b.y, b.z);
  if (running_ >= 0)
    std::fprintf(stderr, ", thread (%u, %u, %u), lane %d of warp %d", threadIdx.x, threadIdx.y, threadIdx.z, lane(), running_ / 32);
  std::fprintf(stderr, "\n  %zu threads: %d have exited, %d wait at a barrier", threads_.size(), exited_, arrived_);
  for (size_t i = 0; i < warps_.size(); ++i)
    for (const Meeting* m : warps_[i].meetings)
      std::fprintf(stderr, "\n  warp %zu: lanes %08x wait in %s(%08x)", i, m->arrived, name_of(m->kind), m->mask);
  std::fprintf(stderr, "\n");
}

void Runner::die_waiting() {
  if (arrived_ > 0) die("%s is not reached by all threads", name_of(barrier_));
  die("a collective is not reached by all lanes of its mask");
}

// --- grids ------------------------------------------------------------------------------------------------------------------

/// The threads of the host that run blocks. They live as long as the process.
class Pool {
 public:
  void run(Grid& grid) {
    std::unique_lock lock(mutex_);
    const size_t want = std::min<size_t>(grid.blocks, std::clamp(std::thread::hardware_concurrency(), 1u, 8u));
    while (size_ < want) std::thread([this, index = size_++] { work(index); }).detach();
    grid_ = &grid;
    wanted_ = want;
    left_ = want;
    ++turn_;
    begun_.notify_all();
    ended_.wait(lock, [&] { return left_ == 0; });
  }

 private:
  void work(size_t index) {
    Runner runner;
    uint64_t seen = 0;
    std::unique_lock lock(mutex_);
    while (true) {
      begun_.wait(lock, [&] { return turn_ != seen && index < wanted_; });
      seen = turn_;
      lock.unlock();
      runner.run(*grid_);
      lock.lock();
      if (--left_ == 0) ended_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable begun_, ended_;
  Grid* grid_ = nullptr;
  uint64_t turn_ = 0;
  size_t size_ = 0, wanted_ = 0, left_ = 0;
};

Runner& current() {
  if (!runner) die("a function of the device is called by the host");
  return *runner;
}

}  // namespace

uint64_t seed() {
  static const uint64_t value = [] {
    const char* text = std::getenv("UNIFLOW_EMULATOR_SEED");
    return text ? std::strtoull(text, nullptr, 10) : 1;
  }();
  return value;
}

unsigned char garbage(uint64_t turn) { return turn % 2 ? 0xff : 0xcb; }

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread_body) {
  static Pool& pool = *new Pool;
  static std::mutex& one_at_a_time = *new std::mutex;
  static uint64_t launches = 0;
  std::lock_guard lock(one_at_a_time);
  Random random{seed() * 0x9e3779b97f4a7c15u + ++launches};
  Grid g{grid, block, shared_bytes, &thread_body, random.next(), uint64_t{grid.x} * grid.y * grid.z, 0, 1, garbage(launches)};
  g.first = random.next() % g.blocks;
  // Of the grid as it is, backwards, and some jumps that meet every block once.
  constexpr uint64_t primes[] = {1, 1, 7919, 104729, 1299709};
  g.stride = primes[random.below(5)];
  if (g.blocks % g.stride == 0) g.stride = 1;
  if (random.below(2)) g.stride = g.blocks - g.stride % g.blocks;
  pool.run(g);
}

void* dynamic_shared() { return current().shared(); }
int lane_id() { return current().lane(); }
int barrier(Barrier kind, bool predicate) { return current().barrier(kind, predicate); }
const void* collective(Collective kind, unsigned mask, const void* mine, size_t bytes) {
  return current().collective(kind, mask, mine, bytes);
}
void yield() { current().yield(); }
std::vector<std::function<void()>>& deferred() { return current().deferred(); }

void die(const char* format, ...) {
  va_list args;
  va_start(args, format);
  std::fflush(stdout);
  std::fprintf(stderr, "CUDA emulator: ");
  std::vfprintf(stderr, format, args);
  std::fprintf(stderr, "\n");
  va_end(args);
  if (runner) runner->describe();
  std::abort();
}

}  // namespace emulator
