/// The host's memory: alignment, reuse, the numbers it reports, and how it refuses.
#include "native/core/allocator.h"

#include <atomic>
#include <thread>

#include "native/test/check.h"

namespace uniflow::test {
namespace {

Allocator& host() { return Device::cpu().memory(); }

constexpr int64_t kSizes[] = {0,       1,         63,      64,        65,          1000,           1024,          1025,       4096,
                              100'000, 262'143, 262'144, 262'145, 1'000'000, (4 << 20) - 1, 4 << 20, (4 << 20) + 1, 20'000'001};

void test_blocks(Placement placement) {
  bool aligned = true, whole = true, counted = true;
  for (int64_t bytes : kSizes) {
    const int64_t before = host().stats().active;
    auto* block = static_cast<unsigned char*>(host().allocate(bytes, placement));
    aligned &= reinterpret_cast<uintptr_t>(block) % 64 == 0;
    std::memset(block, 0x5a, static_cast<size_t>(bytes));
    whole &= bytes == 0 || (block[0] == 0x5a && block[bytes - 1] == 0x5a);
    counted &= host().stats().active == before + bytes;
    host().release(block, bytes, placement);
    counted &= host().stats().active == before;
  }
  const std::string name = placement == Placement::Pooled ? "pooled" : "persistent";
  check(aligned, name + " blocks are aligned to 64 bytes");
  check(whole, name + " blocks can be written from end to end");
  check(counted, name + " blocks count as active until they are released");
}

/// The requests of every layer of a network, with slightly varying sizes: after the first rounds, nothing new is allocated.
void test_steady_loop() {
  host().trim();
  int64_t pool = 0;
  bool steady = true;
  for (int round = 0; round < 50; ++round) {
    std::vector<Tensor> live;
    for (int64_t i = 0; i < 20; ++i) {
      live.emplace_back(DType::Float32, Shape{1000 + i * i * 800 + round % 3});
      live.back().buffer()->allocate();
      if (i % 3 == 2) live.erase(live.begin());
    }
    live.clear();
    if (round == 5) pool = host().stats().pool;
    if (round > 5) steady &= host().stats().pool == pool;
  }
  check(steady && pool > 0, "a steady loop does not grow the pool", std::to_string(pool) + " bytes");
  void* first = host().allocate(100'000, Placement::Pooled);
  host().release(first, 100'000, Placement::Pooled);
  void* second = host().allocate(100'000, Placement::Pooled);
  host().release(second, 100'000, Placement::Pooled);
  check(first == second, "a released block is handed out again");
}

void test_numbers() {
  host().trim();
  const MemoryStats before = host().stats();
  check(before.pool == 0, "trim empties the pool");
  host().reset_peak();
  check(host().stats().peak == before.active, "reset_peak starts again from what is active");
  void* a = host().allocate(1'000'000, Placement::Pooled);
  void* b = host().allocate(2'000'000, Placement::Persistent);
  host().release(a, 1'000'000, Placement::Pooled);
  const MemoryStats after = host().stats();
  check(after.active == before.active + 2'000'000 && after.peak == before.active + 3'000'000, "active and peak are bytes in tensors");
  check(after.pool >= 1'000'000 && after.pool <= 1'125'000 + 4096, "the pool keeps a released block, an eighth larger at most", std::to_string(after.pool));
  host().release(b, 2'000'000, Placement::Persistent);
  check(host().stats().pool == after.pool, "persistent blocks go back to the system, not to the pool");
  host().trim();
  check(host().stats().pool == 0, "trim empties the pool again");
}

void test_refusals() {
  const MemoryStats before = host().stats();
  for (int64_t bytes : {int64_t{1} << 50, int64_t{1} << 62, std::numeric_limits<int64_t>::max() - 100, std::numeric_limits<int64_t>::max()})
    for (Placement placement : {Placement::Pooled, Placement::Persistent}) {
      const std::string code = error_code([&] { host().allocate(bytes, placement); });
      check(code == "OUT_OF_MEMORY", std::to_string(bytes) + " bytes are refused", code);
    }
  try {
    host().allocate(int64_t{1} << 50, Placement::Pooled);
  } catch (const Error& e) {
    check(std::string(e.what()).find("1125899906842624") != std::string::npos, "the message says how much was asked for", e.what());
  }
  const MemoryStats after = host().stats();
  check(after.active == before.active && after.peak == before.peak && after.pool == before.pool, "a refusal changes no number");
  check(error_code([] { Tensor(DType::Float32, {int64_t{1} << 40, int64_t{1} << 40}); }) != "nothing", "a shape of more elements than 64 bits count is refused");
  check(error_code([] { Tensor(DType::Float32, {int64_t{1} << 62}); }) != "nothing", "and so is one of more bytes");
}

void test_threads() {
  const int64_t before = host().stats().active;
  std::vector<std::thread> threads;
  std::atomic<bool> ok{true};
  for (unsigned n = 0; n < 8; ++n)
    threads.emplace_back([&, n] {
      std::mt19937 random(n);
      std::vector<std::pair<unsigned char*, int64_t>> live;
      for (int i = 0; i < 500; ++i) {
        const int64_t bytes = 1 + random() % 300'000;
        live.emplace_back(static_cast<unsigned char*>(host().allocate(bytes, Placement::Pooled)), bytes);
        live.back().first[0] = live.back().first[bytes - 1] = static_cast<unsigned char>(n);
        if (live.size() < 8) continue;
        const auto [block, size] = live.front();
        if (block[0] != n || block[size - 1] != n) ok = false;
        host().release(block, size, Placement::Pooled);
        live.erase(live.begin());
        if (i % 100 == 0) host().trim();
      }
      for (const auto& [block, size] : live) host().release(block, size, Placement::Pooled);
    });
  for (std::thread& t : threads) t.join();
  check(ok, "eight threads at once: no block is handed out twice");
  check(host().stats().active == before, "and all is given back");
}

/// A tensor, its views and its copies share one block, which goes with the last of them.
void test_tensors() {
  const int64_t before = host().stats().active;
  {
    Tensor view;
    {
      const Tensor t = to_tensor(DType::Float32, {6, 2}, normal(12, 1));
      view = t.slice(2, 5).reshape({2, 3});
      check(view.data<float>() == t.data<float>() + 4 && view.shape() == Shape{2, 3}, "a view shares its tensor's memory");
    }
    check(host().stats().active == before + 48, "and keeps it");
  }
  check(host().stats().active == before, "until it is gone itself");
}

}  // namespace
}  // namespace uniflow::test

int main() {
  using namespace uniflow;
  using namespace uniflow::test;
  test_blocks(Placement::Pooled);
  test_blocks(Placement::Persistent);
  test_steady_loop();
  test_numbers();
  test_refusals();
  test_threads();
  test_tensors();
  return finish();
}
