/// Casts, gated activations, rotary positions and the Euler step of the instruction set in use (environment variable
/// UNIFLOW_ISA), against double precision; and the portable exponential that they share.
#include "native/ops/elementwise.h"

#include <bit>
#include <numbers>

#include "native/cpu/kernels.h"
#include "native/ops/attention.h"
#include "native/test/check.h"

#define UNIFLOW_ISA portable
#include "native/cpu/simd.h"

namespace uniflow::test {
namespace {

constexpr int64_t kSizes[] = {0, 1, 3, 17, 1025, 16384, 16385, 40000};  // around the kernels' chunks of 16384

Array cast(const Array& x, DType to) {
  Array out(to, x.size());
  cpu::kernels().cast(x.data(), x.dtype(), out.data(), to, x.size());
  return out;
}

float from_bits(uint32_t bits) { return std::bit_cast<float>(bits); }
uint32_t bits_at(const Array& a, int64_t i) {
  if (a.dtype() == DType::BFloat16) return reinterpret_cast<const bf16*>(a.data())[i].bits;
  return std::bit_cast<uint32_t>(a.floats()[i]);
}

/// Every bfloat16 becomes the float32 of the same value, a NaN with its payload.
void test_widen() {
  Array x(DType::BFloat16, 1 << 16);
  for (int64_t i = 0; i < x.size(); ++i) reinterpret_cast<bf16*>(x.data())[i].bits = static_cast<uint16_t>(i);
  const Array out = cast(x, DType::Float32);
  bool ok = true;
  for (int64_t i = 0; i < x.size(); ++i) ok &= bits_at(out, i) == static_cast<uint32_t>(i) << 16;
  check(ok, "cast of all 65536 bfloat16 values to float32");
}

/// The bfloat16 nearest to x, the even one of two; found by distance, not by arithmetic on bits.
bool is_nearest(float x, uint32_t got) {
  if (std::isnan(x)) return (got & 0x7fffu) > 0x7f80u && (got >> 15) == (std::bit_cast<uint32_t>(x) >> 31);
  const uint32_t low = std::bit_cast<uint32_t>(x) >> 16;  // next below in magnitude
  auto distance = [&](uint32_t bits) {
    const double v = bits % 0x8000u == 0x7f80u ? std::copysign(0x1p128, x) : double{from_bits(bits << 16)};  // infinity where 2^128 would be
    return std::abs(v - (std::isinf(x) ? std::copysign(0x1p128, x) : double{x}));
  };
  if (distance(low) == 0) return got == low;
  const double down = distance(low), up = distance(low + 1);
  return got == (down < up || (down == up && low % 2 == 0) ? low : low + 1);
}

/// For each run of 65536 float32 values that share their upper half: those around a tie, and both ends.
void test_narrow() {
  const uint32_t lower[] = {0, 1, 0x7fff, 0x8000, 0x8001, 0xffff};
  Array x(DType::Float32, (1 << 16) * 6);
  for (int64_t i = 0; i < x.size(); ++i) x.floats()[i] = from_bits(static_cast<uint32_t>(i / 6) << 16 | lower[i % 6]);
  const Array out = cast(x, DType::BFloat16);
  int64_t wrong = 0, flushed = 0, tiny = 0;
  for (int64_t i = 0; i < x.size(); ++i) {
    const float v = x.floats()[i];
    const bool subnormal = v != 0 && std::abs(v) < std::numeric_limits<float>::min();
    const bool zero = subnormal && bits_at(out, i) == (std::signbit(v) ? 0x8000u : 0u);
    tiny += subnormal;
    flushed += zero;
    wrong += !zero && !is_nearest(v, bits_at(out, i));
  }
  check(wrong == 0, "cast to bfloat16 rounds to the nearest, ties to even, NaN to NaN", std::to_string(wrong) + " wrong");
  // AVX512-BF16's conversion takes subnormal numbers for zero; all others round them.
  check(flushed == tiny || flushed < tiny / 50, "cast of subnormal numbers: all rounded, or all zero", std::to_string(flushed) + " of " + std::to_string(tiny) + " are zero");
}

void test_cast_sizes() {
  for (int64_t n : kSizes) {
    const Array x(DType::Float32, normal(n, 1)), half = cast(x, DType::BFloat16);
    bool ok = cast(x, DType::Float32) == x && cast(half, DType::BFloat16) == half && cast(cast(half, DType::Float32), DType::BFloat16) == half;
    for (int64_t i = 0; i < n; ++i) ok &= is_nearest(x.floats()[i], bits_at(half, i));
    check(ok, "cast of " + std::to_string(n) + " values, each pair of types");
  }
}

double silu(double x) { return x / (1 + std::exp(-x)); }

void test_swiglu(DType dtype, int64_t rows, int64_t n) {
  const Array x(dtype, normal(rows * 2 * n, 2, 4)), out(dtype, rows * n);
  cpu::kernels().swiglu(x.data(), out.data(), dtype, rows, n);
  std::vector<double> want;
  for (int64_t i = 0; i < rows * n; ++i) want.push_back(silu(x[i / n * 2 * n + i % n]) * x[i / n * 2 * n + n + i % n]);
  check_below(worst(out, want), floor_of(dtype, 16), std::string("swiglu ") + name_of(dtype) + " " + to_string({rows, 2 * n}));
}

void test_silu_sum(DType dtype, int64_t rows, int64_t n, bool shared) {
  const int64_t stride = shared ? 0 : n + 3;
  const Array x(DType::Float32, normal(rows * n, 3, 4)), y(DType::Float32, normal((rows - 1) * stride + n, 4)), out(dtype, rows * n);
  cpu::kernels().silu_sum(x.floats(), y.floats(), stride, out.data(), dtype, rows, n);
  std::vector<double> want;
  for (int64_t i = 0; i < rows * n; ++i) want.push_back(silu(x[i] + y[i / n * stride + i % n]));
  check_below(worst(out, want), floor_of(dtype, 16), std::string("silu_sum to ") + name_of(dtype) + " " + to_string({rows, n}) + (shared ? ", one y for all" : ""));
}

void test_euler(int64_t n, bool guided) {
  const Array v(DType::Float32, normal(n, 5)), v0(DType::Float32, normal(n, 6)), x(DType::Float32, normal(n, 7));
  std::vector<double> want;
  for (int64_t i = 0; i < n; ++i) want.push_back(x[i] + 0.25 * (guided ? v0[i] + 2.5 * (v[i] - v0[i]) : v[i]));
  cpu::kernels().euler(x.floats(), v.floats(), guided ? v0.floats() : nullptr, 2.5f, 0.25f, n);
  check_below(worst(x, want), 16 * 0x1p-24, "euler of " + std::to_string(n) + " values" + (guided ? ", guided" : ""));
}

struct Rope {
  DType dtype;
  int64_t batch, seq, heads, head_dim, prefix;
};

void test_rope(const Rope& r) {
  const int64_t width = r.heads * r.head_dim, half = r.head_dim / 2;
  const Array x(r.dtype, normal(r.batch * r.seq * 3 * width, 8)), out(r.dtype, x.size());
  const Array cosine(DType::Float32, normal((r.seq - r.prefix) * r.head_dim, 9)), sine(DType::Float32, normal((r.seq - r.prefix) * r.head_dim, 10));
  cpu::kernels().rope({x.data(), out.data(), r.dtype, r.batch, r.seq, r.heads, r.head_dim, r.prefix, cosine.floats(), sine.floats()});
  std::vector<double> want;
  for (int64_t i = 0; i < x.size(); ++i) {
    const int64_t patch = i / (3 * width) % r.seq - r.prefix, column = i % (3 * width), e = column % r.head_dim, at = patch * r.head_dim + e;
    if (patch < 0 || column >= 2 * width) want.push_back(x[i]);
    else want.push_back(x[i] * cosine[at] + (e < half ? -x[i + half] : x[i - half]) * sine[at]);
  }
  check_below(worst(out, want), floor_of(r.dtype, 4), std::string("rope ") + name_of(r.dtype) + " " + to_string({r.batch, r.seq, r.heads, r.head_dim}) +
                                                          ", prefix " + std::to_string(r.prefix));
}

void test_rope_table(int64_t rows, int64_t cols, int64_t head_dim, RopeUnit unit) {
  const Array table = to_array(ops::rope_table(session(), rows, cols, head_dim, 100, unit));
  const int64_t n = rows * cols, quarter = head_dim / 4;
  std::vector<double> want(static_cast<size_t>(2 * n * head_dim));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c)
      for (int64_t i = 0; i < head_dim; ++i) {
        const double centre[2] = {(2.0 * static_cast<double>(r) + 1) / static_cast<double>(rows) - 1, (2.0 * static_cast<double>(c) + 1) / static_cast<double>(cols) - 1};
        const double frequency = 1 / std::pow(100.0, static_cast<double>(i % quarter) / static_cast<double>(quarter));
        const int64_t place[2] = {r, c};
        const auto axis = i / quarter % 2;
        const double angle = (unit == RopeUnit::Patch ? static_cast<double>(place[axis]) : 2 * std::numbers::pi * centre[axis]) * frequency;
        const auto at = static_cast<size_t>((r * cols + c) * head_dim + i);
        want[at] = std::cos(angle);
        want[at + static_cast<size_t>(n * head_dim)] = std::sin(angle);
      }
  check_below(worst(table, want), 2e-7, "rope_table " + to_string({rows, cols, head_dim}));
}

void test_count_non_finite() {
  for (int64_t n : kSizes) {
    Array x(DType::Float32, normal(n, 12));
    int64_t bad = 0;
    for (int64_t i = 0; i < n; ++i) {
      const float odd[] = {NAN, INFINITY, -INFINITY, std::numeric_limits<float>::max(), std::numeric_limits<float>::denorm_min(), -0.0f};
      if (i % 1000 != 0 && i + 1 != n) continue;
      const int64_t kind = (i / 1000 + n) % 6;
      x.floats()[i] = odd[kind];
      bad += kind < 3;
    }
    const int64_t found = cpu::kernels().count_non_finite(x.floats(), n);
    check(found == bad, "count_non_finite of " + std::to_string(n), std::to_string(found) + ", is " + std::to_string(bad));
  }
}

/// e^x as the kernels compute it. silu(x) = x / (1 + e^-x) shows it for large -x; the header itself for all x.
void test_exp() {
  namespace simd = cpu::portable;
  double error = 0;
  for (int i = 0; i <= 1750000; ++i) {
    const float x = -87.0f + static_cast<float>(i) * 1e-4f;
    error = std::max(error, std::abs(double{simd::exp(simd::splat(x))[0]} / std::exp(double{x}) - 1));
  }
  check_below(error, 3e-7, "exp on [-87, 88], portable, relative");
  check(simd::exp(simd::splat(-1e30f))[0] <= 2e-38f && simd::exp(simd::splat(1e30f))[0] >= 1e38f && std::isfinite(simd::exp(simd::splat(INFINITY))[0]),
        "exp outside of its range is tiny, or large but finite");

  constexpr int64_t n = 100000;
  const Array x(DType::Float32, n), zero(DType::Float32, n), out(DType::Float32, n);
  for (int64_t i = 0; i < n; ++i) x.floats()[i] = -88.0f + static_cast<float>(i) * 5e-4f;
  cpu::kernels().silu_sum(x.floats(), zero.floats(), n, out.data(), DType::Float32, 1, n);
  error = 0;
  for (int64_t i = 0; i < n; ++i) error = std::max(error, std::abs(out[i] / silu(x[i]) - 1));
  check_below(error, 4e-7, "silu on [-88, -38], relative, where it is x e^x");
}

void test_ops() {
  const auto s = session();
  const Tensor x = to_tensor(DType::Float32, {2, 5, 6}, normal(60, 13));
  const Array values = to_array(x);
  check(to_array(ops::cast(s, x, DType::BFloat16)) == cast(values, DType::BFloat16), "ops::cast is the kernel");
  check(ops::cast(s, x, DType::Float32).buffer() == x.buffer(), "ops::cast to the same type is the same tensor");
  const Array part = to_array(ops::slice_tokens(s, x, 1, 4));
  bool ok = part.size() == 36;
  for (int64_t i = 0; i < 36; ++i) ok &= part[i] == values[i / 18 * 30 + 6 + i % 18];
  check(ok, "slice_tokens takes the same tokens of every image");
  check(ops::slice_tokens(s, x, 0, 5).buffer() == x.buffer(), "slice_tokens of all is the same tensor");
  check(to_array(ops::slice_tokens(s, x, 2, 2)).size() == 0, "slice_tokens of none is empty");
  check(ops::swiglu(s, x).shape() == Shape{2, 5, 3}, "ops::swiglu halves the last dimension");

  ops::check_finite(s, x, "x");
  check(!wait(x), "check_finite passes finite values");
  Array broken(DType::Float32, normal(8, 14));
  broken.set(3, INFINITY);
  const Tensor bad = to_tensor(broken, {8});
  ops::check_finite(s, bad, "latent");
  const auto failure = wait(ops::cast(s, bad, DType::BFloat16));
  check(failure && failure->code == ErrorCode::BadInput && failure->subject == "latent" && failure->op == "checkFinite", "check_finite fails what depends on the tensor",
        failure ? failure->what() : "no failure");
}

void test_refusals() {
  const auto s = idle_session();
  const Tensor x(DType::Float32, {2, 5, 6}), packed = ops::pack_linear(s, Tensor(DType::Float32, {4, 4}), DType::Float32);
  check_refused("a cast of bytes", [&] { ops::cast(s, Tensor(DType::UInt8, {4}), DType::Float32); });
  check_refused("a cast to int32", [&] { ops::cast(s, x, DType::Int32); });
  check_refused("a cast of a packed weight", [&] { ops::cast(s, packed, DType::BFloat16); });
  check_refused("swiglu of an odd width", [&] { ops::swiglu(s, Tensor(DType::Float32, {2, 5})); });
  check_refused("swiglu of a scalar", [&] { ops::swiglu(s, Tensor(DType::Float32, {})); });
  check_refused("check_finite of bfloat16", [&] { ops::check_finite(s, Tensor(DType::BFloat16, {4}), "x"); });
  check_refused("tokens past the end", [&] { ops::slice_tokens(s, x, 2, 6); });
  check_refused("tokens from -1", [&] { ops::slice_tokens(s, x, -1, 2); });
  check_refused("tokens backwards", [&] { ops::slice_tokens(s, x, 3, 2); });
  const Tensor qkv(DType::Float32, {1, 4, 18});  // one head of 6, two of 3
  auto table = [](int64_t n, int64_t e) { return Tensor(DType::Float32, {2, n, e}); };
  check_refused("rope with a table of another grid", [&] { ops::rope(s, qkv, 1, 1, table(4, 6)); });
  check_refused("rope with a longer prefix than tokens", [&] { ops::rope(s, qkv, 1, 5, table(0, 6)); });
  check_refused("rope with a number of heads that does not divide", [&] { ops::rope(s, qkv, 4, 1, table(3, 6)); });
  check_refused("rope of an odd head width, whose middle has no pair", [&] { ops::rope(s, qkv, 2, 1, table(3, 3)); });
  check_refused("a rope table of a width that 4 does not divide", [&] { ops::rope_table(s, 2, 2, 6, 100, RopeUnit::Image); });
  check_refused("a rope table of no rows", [&] { ops::rope_table(s, 0, 2, 8, 100, RopeUnit::Image); });
}

}  // namespace
}  // namespace uniflow::test

int main() {
  using namespace uniflow;
  using namespace uniflow::test;
  std::printf("elementwise, instruction set %s\n", cpu::kernels().name);
  test_widen();
  test_narrow();
  test_cast_sizes();
  for (DType dtype : {DType::Float32, DType::BFloat16}) {
    for (int64_t n : {1, 7, 17, 588, 1025})
      for (int64_t rows : {1, 5}) {
        test_swiglu(dtype, rows, n);
        for (bool shared : {false, true}) test_silu_sum(dtype, rows, n, shared);
      }
    for (const auto& [heads, head_dim] : {std::pair<int64_t, int64_t>{1, 4}, {3, 12}, {2, 34}, {3, 64}, {2, 88}})
      for (int64_t prefix : {0, 1, 5, 9}) test_rope({dtype, 2, 9, heads, head_dim, prefix});
  }
  for (int64_t n : kSizes)
    for (bool guided : {false, true}) test_euler(n, guided);
  for (RopeUnit unit : {RopeUnit::Image, RopeUnit::Patch}) {
    test_rope_table(1, 1, 4, unit);
    test_rope_table(5, 3, 64, unit);
  }
  test_count_non_finite();
  test_exp();
  test_ops();
  test_refusals();
  return finish();
}
