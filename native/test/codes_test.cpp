/// Finite scalar quantisation of the instruction set in use (environment variable UNIFLOW_ISA): against the paper's formula in double
/// precision, and every code of several lists of levels to latents and back.
#include "native/cpu/kernels.h"
#include "native/ops/codes.h"
#include "native/test/check.h"

namespace uniflow::test {
namespace {

using LevelList = std::vector<uint32_t>;

std::string text_of(const LevelList& levels) {
  std::string out;
  for (const uint32_t level : levels) out += (out.empty() ? "" : ",") + std::to_string(level);
  return out;
}

/// f(x) of the paper: bounded to the digits of a channel, not rounded.
double bounded(double x, uint32_t level) {
  const double range = (level - 1) * 1.001 / 2, offset = level % 2 ? 0 : 0.5;
  return range * std::tanh(x + std::atanh(offset / range)) - offset;
}

double slope(double x, uint32_t level) {
  const double range = (level - 1) * 1.001 / 2, offset = level % 2 ? 0 : 0.5, t = std::tanh(x + std::atanh(offset / range));
  return range * (1 - t * t) / (level / 2);
}

Tensor to_codes(const std::vector<int32_t>& codes, Shape shape) {
  Tensor t(DType::Int32, std::move(shape));
  t.buffer()->allocate();
  std::memcpy(t.data(), codes.data(), codes.size() * sizeof(int32_t));
  return t;
}

std::vector<int32_t> codes_in(const Tensor& t) {
  std::vector<int32_t> out(static_cast<size_t>(t.size()));
  const auto failure = wait(t);
  check(!failure, "codes to look at", failure ? failure->what() : "");
  if (!failure) std::memcpy(out.data(), t.data(), out.size() * sizeof(int32_t));
  return out;
}

void test_values(DType dtype, const LevelList& levels, int64_t rows, int64_t groups) {
  const auto channels = static_cast<int64_t>(levels.size()), width = groups * channels;
  const Array x(dtype, normal(rows * width, 1, 1.5)), d(dtype, normal(rows * width, 2));
  const Tensor in = to_tensor(x, {rows, width});
  const Array got = to_array(ops::fsq(session(), in, levels));
  const Array gradient = to_array(ops::fsq_backward(session(), in, to_tensor(d, {rows, width}), levels));
  double error = 0;
  std::vector<double> want_gradient;
  for (int64_t i = 0; i < x.size(); ++i) {
    const uint32_t level = levels[static_cast<size_t>(i % channels)];
    const double b = bounded(x[i], level);
    if (std::abs(b - std::floor(b) - 0.5) > 1e-4) error = std::max(error, std::abs(got[i] - std::nearbyint(b) / (level / 2)));  // no tie
    want_gradient.push_back(d[i] * slope(x[i], level));
  }
  const std::string name = std::string(name_of(dtype)) + " " + to_string({rows, width}) + ", levels " + text_of(levels);
  check_below(error, floor_of(dtype, 1), "fsq " + name);
  check_below(worst(gradient, want_gradient), floor_of(dtype, 32), "fsq, gradient " + name);
}

/// All codes of one group, in both dtypes of the latents.
void test_round_trip(const LevelList& levels) {
  int64_t count = 1;
  for (const uint32_t level : levels) count *= level;
  std::vector<int32_t> all(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) all[static_cast<size_t>(i)] = static_cast<int32_t>(i);
  const Tensor latents = ops::codes_to_latents(session(), to_codes(all, {count, 1}), levels);
  const Array values = to_array(latents);
  bool formula = true;
  for (int64_t i = 0, n = static_cast<int64_t>(levels.size()); i < values.size(); ++i) {
    int64_t radix = 1;
    for (int64_t c = 0; c < i % n; ++c) radix *= levels[static_cast<size_t>(c)];
    const int64_t level = levels[static_cast<size_t>(i % n)], half = level / 2;
    formula = formula && values.floats()[i] == static_cast<float>(i / n / radix % level - half) / static_cast<float>(half);
  }
  check(formula, "codes to latents by mixed radix, levels " + text_of(levels));
  check(codes_in(ops::latents_to_codes(session(), latents, levels)) == all, "codes to latents and back, levels " + text_of(levels));
  Array half(DType::BFloat16, values.size());
  for (int64_t i = 0; i < values.size(); ++i) half.set(i, values[i]);
  const auto channels = static_cast<int64_t>(levels.size());
  check(codes_in(ops::latents_to_codes(session(), to_tensor(half, {count, channels}), levels)) == all, "and in bfloat16, levels " + text_of(levels));
}

/// Quantised latents are those of their codes, to the bit, and every level is reached.
void test_consistency(DType dtype, const LevelList& levels) {
  const auto channels = static_cast<int64_t>(levels.size());
  std::vector<float> values;
  for (int i = 0; i < 4096; ++i)
    for (int64_t c = 0; c < channels; ++c) values.push_back(static_cast<float>((i * (c + 1)) % 4096) / 256 - 8);
  const Tensor z = ops::fsq(session(), to_tensor(dtype, {4096, channels}, values), levels);
  const Array again = to_array(ops::codes_to_latents(session(), ops::latents_to_codes(session(), z, levels), levels));
  const Array own = to_array(z), same(dtype, std::vector<float>(again.floats(), again.floats() + again.size()));
  check(own == same, std::string("latents of their codes, ") + name_of(dtype) + ", levels " + text_of(levels));
  bool all = true;
  for (int64_t c = 0; c < channels; ++c) {
    std::vector<double> seen;
    for (int64_t i = c; i < own.size(); i += channels) seen.push_back(own[i]);
    std::ranges::sort(seen);
    const auto distinct = std::ranges::unique(seen).begin() - seen.begin();
    all = all && distinct == static_cast<int64_t>(levels[static_cast<size_t>(c)]);
  }
  check(all, std::string("every level is reached, ") + name_of(dtype) + ", levels " + text_of(levels));
}

void test_bad_values() {
  for (const int32_t code : {-1, 64}) {
    const auto failure = wait(ops::codes_to_latents(session(), to_codes({0, code, 63}, {1, 3}), {4, 4, 4}));
    check(failure && failure->code == ErrorCode::BadInput && failure->subject == "codes", "a code of " + std::to_string(code) + " fails the latents",
          failure ? failure->what() : "no failure");
  }
  const Tensor broken = ops::fsq(session(), to_tensor(DType::Float32, {1, 2}, {NAN, 9}), {5, 5});
  check(std::isnan(to_array(broken)[0]) && to_array(broken)[1] == 1, "a NaN stays a NaN");
  check(codes_in(ops::latents_to_codes(session(), broken, {5, 5}))[0] == 20, "its code is one that exists");
}

void test_refusals() {
  const auto s = idle_session();
  const Tensor x(DType::Float32, {2, 6});
  check_refused("no levels", [&] { ops::fsq(s, x, {}); });
  check_refused("a single level", [&] { ops::fsq(s, x, {8, 1}); });
  check_refused("too many levels", [&] { ops::fsq(s, x, {257}); });
  check_refused("too many codes", [&] { ops::fsq(s, x, {256, 256, 2}); });
  check_refused("too many channels", [&] { ops::fsq(s, Tensor(DType::Float32, {17}), LevelList(17, 2)); });
  check_refused("groups that do not divide the latents", [&] { ops::fsq(s, x, {5, 5, 5, 5}); });
  check_refused("a gradient of another shape", [&] { ops::fsq_backward(s, x, Tensor(DType::Float32, {2, 3}), {5, 5}); });
  check_refused("float codes", [&] { ops::codes_to_latents(s, x, {5, 5}); });
}

}  // namespace
}  // namespace uniflow::test

int main() {
  using namespace uniflow;
  using namespace uniflow::test;
  std::printf("codes, instruction set %s\n", cpu::kernels().name);
  const LevelList lists[] = {{2}, {3}, {256}, {255}, {7, 5}, {8, 6, 5}, {4, 4, 4}, {2, 3, 2, 5}, {8, 8, 8, 5, 5, 5}, {256, 256}, LevelList(16, 2)};
  for (const LevelList& levels : lists) {
    for (DType dtype : {DType::Float32, DType::BFloat16}) {
      for (const auto& [rows, groups] : {std::pair<int64_t, int64_t>{1, 1}, {7, 3}, {1025, 17}}) test_values(dtype, levels, rows, groups);
      test_consistency(dtype, levels);
    }
    test_round_trip(levels);
  }
  test_bad_values();
  test_refusals();
  return finish();
}
