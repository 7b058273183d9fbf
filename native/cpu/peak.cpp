/// Measures how fast this machine multiplies, adds and copies, per instruction set.
#include <algorithm>
#include <chrono>
#include <utility>

#include "native/core/parallel.h"
#include "native/cpu/int8_units.h"
#include "native/cpu/kernels.h"

namespace uniflow::cpu::UNIFLOW_ISA {
namespace {

// Enough independent chains to hide the latency of an FMA on any core (4-5 cycles x 2 units), and few enough to stay in registers.
constexpr int kChains = kWidth == 16 ? 24 : 12;
constexpr int64_t kRounds = 2'000'000;

template <class Step, size_t... I>
inline void unrolled(Step&& step, std::index_sequence<I...>) {
  (step.template operator()<I>(), ...);
}

/// The best rate, in work per second, over half a second of calls: on a shared machine only a few of them have all cores to themselves.
template <class Body>
double best_rate(double work, Body&& body) {
  using Clock = std::chrono::steady_clock;
  constexpr std::chrono::milliseconds kMeasured{500};
  double best = 0;
  const auto end = Clock::now() + kMeasured;
  for (auto begin = Clock::now(); begin < end; begin = Clock::now()) {
    body();
    const std::chrono::duration<double> taken = Clock::now() - begin;
    best = std::max(best, work / taken.count());
  }
  return best;
}

/// Best FLOP/s of kRounds of kChains multiply-adds on every thread.
template <class Chain>
double best_flops(double flops_per_step, Chain&& chain) {
  const int threads = team_size();
  return best_rate(flops_per_step * kChains * static_cast<double>(kRounds) * threads, [&] { parallel_for(threads, chain); });
}

void float_chain(int64_t) {
  vf a[kChains];
  for (int i = 0; i < kChains; ++i) a[i] = splat(static_cast<float>(i));
  vf x = splat(1.0f - 1e-7f), y = splat(1e-9f);
  asm volatile("" : "+m"(x), "+m"(y));
  for (int64_t r = 0; r < kRounds; ++r)
    unrolled([&]<size_t I>() { a[I] = a[I] * x + y; }, std::make_index_sequence<kChains>());
  vf total = {};
  for (int i = 0; i < kChains; ++i) total += a[i];
  volatile float sink = sum(total);
  (void)sink;
}

#ifdef __AVX512BF16__
void bfloat16_chain(int64_t) {
  __m512 a[kChains];
  for (int i = 0; i < kChains; ++i) a[i] = (__m512)splat(static_cast<float>(i));
  vf ones = splat(1.0f), small = splat(1e-9f);
  asm volatile("" : "+m"(ones), "+m"(small));
  const __m512bh x = (__m512bh)ones, y = (__m512bh)small;
  for (int64_t r = 0; r < kRounds; ++r)
    unrolled([&]<size_t I>() { a[I] = _mm512_dpbf16_ps(a[I], x, y); }, std::make_index_sequence<kChains>());
  vf total = {};
  for (int i = 0; i < kChains; ++i) total += (vf)a[i];
  volatile float sink = sum(total);
  (void)sink;
}
#endif

void int8_chain(int64_t) {
  vi a[kChains];
  for (int i = 0; i < kChains; ++i) a[i] = vi{} + i;
  vu zeros = {};
  asm volatile("" : "+m"(zeros));
  for (int64_t r = 0; r < kRounds; ++r)  // the sum is an operand as well: otherwise one product would serve all chains
    unrolled([&]<size_t I>() { a[I] = Int8Units::multiply_add(a[I], (vu)a[I], zeros); }, std::make_index_sequence<kChains>());
  vi total = {};
  for (int i = 0; i < kChains; ++i) total += a[i];
  volatile int32_t sink = total[0] ^ total[kWidth - 1];
  (void)sink;
}

}  // namespace

double peak(DType dtype) {
  if (dtype == DType::Int8) return best_flops(2.0 * Int8Units::kPerUnit * kWidth, int8_chain);
#ifdef __AVX512BF16__
  if (dtype == DType::BFloat16) return best_flops(4.0 * kWidth, bfloat16_chain);
#endif
  (void)dtype;  // without bfloat16 arithmetic, bfloat16 layers are computed in float32
  return best_flops(2.0 * kWidth, float_chain);
}

double copy_rate(void* to, const void* from, int64_t bytes) {
  constexpr int64_t kSlice = 1 << 20;
  return best_rate(2.0 * static_cast<double>(bytes), [&] {
    parallel_for(bytes / kSlice, [&](int64_t i) { std::memcpy(static_cast<char*>(to) + i * kSlice, static_cast<const char*>(from) + i * kSlice, kSlice); });
  });
}

}  // namespace uniflow::cpu::UNIFLOW_ISA
