/// Finite scalar quantisation on the GPU against the CPU's.
#include "native/ops/codes.h"
#include "native/test/gpu/gpu.h"

namespace uniflow::test {
namespace {

constexpr DType kTypes[] = {DType::BFloat16, DType::Float32};

Array ints(const std::vector<int32_t>& values) {
  Array out(DType::Int32, static_cast<int64_t>(values.size()));
  std::memcpy(out.data(), values.data(), values.size() * sizeof(int32_t));
  return out;
}

/// Inputs at least 1e-3 from where the digit changes: the GPU's tanh may differ in its last bits.
Array clear_of_ties(const Levels& levels, DType dtype, int64_t n) {
  Array x(dtype, normal(n, 1, 1.5));
  for (int64_t i = 0; i < n; ++i) {
    const Level& l = levels.channel[i % levels.count];
    const auto distance = [&] {
      const double b = l.range * std::tanh(x[i] + l.shift) - l.offset;
      return std::abs(b - std::floor(b) - 0.5);
    };
    while (distance() < 1e-3) x.set(i, x[i] + 0.05);
  }
  return x;
}

void check_case(DType dtype, const std::vector<uint32_t>& list, int64_t groups) {
  const Levels levels = ops::levels_of(list);
  const int64_t n = groups * levels.count;
  const Array x = clear_of_ties(levels, dtype, n), d(dtype, normal(n, 2)), want(dtype, n), want_d(dtype, n), codes(DType::Int32, groups), latents(DType::Float32, n);
  cpu::kernels().fsq(levels, x.data(), want.data(), dtype, n);
  cpu::kernels().fsq_backward(levels, x.data(), d.data(), want_d.data(), dtype, n);
  cpu::kernels().latents_to_codes(levels, want.data(), static_cast<int32_t*>(codes.data()), dtype, groups);
  cpu::kernels().codes_to_latents(levels, static_cast<int32_t*>(codes.data()), latents.floats(), groups);
  const DeviceArray on_gpu(x), d_out(d), got(dtype, n), got_d(dtype, n), got_codes(DType::Int32, groups), got_latents(DType::Float32, n);
  gpu().fsq(levels, on_gpu.data(), got.data(), dtype, n);
  gpu().fsq_backward(levels, on_gpu.data(), d_out.data(), got_d.data(), dtype, n);
  gpu().latents_to_codes(levels, got.data(), got_codes.as<int32_t>(), dtype, groups);
  const int64_t outside = gpu().codes_to_latents(levels, got_codes.as<int32_t>(), got_latents.as<float>(), groups);
  const std::string title = std::string("codes ") + name_of(dtype) + " " + to_string(Shape{groups, levels.count});
  check(got.host() == want, title + ", quantised");
  check_close(got_d.host(), want_d, dtype == DType::BFloat16 ? 1e-2 : 1e-5, title + ", gradient");
  check(got_codes.host() == codes && outside == 0, title + ", codes");
  check(got_latents.host() == latents, title + ", latents");
}

void check_bad_codes() {
  const Levels levels = ops::levels_of({5, 5});
  const DeviceArray codes(ints({0, -1, 24, 25, INT32_MAX, INT32_MIN, 3})), latents(DType::Float32, 14);
  const int64_t outside = gpu().codes_to_latents(levels, codes.as<int32_t>(), latents.as<float>(), 7);
  check(outside == 4, "codes that do not exist", std::to_string(outside));
}

}  // namespace

void check_codes() {
  for (const DType dtype : kTypes)
    for (const int64_t groups : {1, 7, 1025}) {
      check_case(dtype, {8, 8, 8, 5, 5, 5}, groups);
      check_case(dtype, {7, 5, 3}, groups);
      check_case(dtype, {256}, groups);
      check_case(dtype, std::vector<uint32_t>(16, 2), groups);
    }
  check_bad_codes();
}

void bench_codes() {
  const Levels levels = ops::levels_of({8, 8, 8, 5, 5, 5});
  const int64_t groups = emulated() ? 64 : 32 * 1024 * 8, n = groups * levels.count;
  for (const DType dtype : kTypes) {
    const DeviceArray x = DeviceArray::normal(dtype, n), out(dtype, n);
    time_gpu("fsq " + to_string(Shape{groups, levels.count}), {.flops = 0, .bytes = static_cast<double>(x.bytes() + out.bytes())}, dtype,
             [&] { gpu().fsq(levels, x.data(), out.data(), dtype, n); });
  }
}

}  // namespace uniflow::test
