/// The noise: Philox4x32-10 against the published vectors, the normal numbers against stored ones and against their
/// distribution, and what they may not depend on.

#include "native/core/philox.h"
#include "native/core/team.h"
#include "native/cpu/kernels.h"
#include "native/ops/flow.h"
#include "native/ops/load.h"
#include "native/test/check.h"

namespace uniflow::test {
namespace {

/// The known answers that come with Random123, the authors' own implementation.
void test_known_answers() {
  struct Known {
    const char* name;
    PhiloxBlock counter;
    uint64_t key;
    PhiloxBlock answer;
  };
  constexpr uint32_t ones = 0xffffffff;
  const Known known[] = {
      {"zeros", {0, 0, 0, 0}, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {"ones", {ones, ones, ones, ones}, ~uint64_t{0}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {"digits of pi", {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, 0x299f31d0a4093822, {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const Known& k : known) check(philox(k.counter, k.key) == k.answer, std::string("Philox4x32-10 of ") + k.name);
  check(philox_uniform(0) == 0x1p-24f && philox_uniform(ones) == 1.0f, "uniform numbers lie in (0, 1]");
}

Array noise(uint64_t seed, const std::vector<uint32_t>& ids, int64_t patches, int64_t width) {
  Array out(DType::Float32, static_cast<int64_t>(ids.size()) * patches * width);
  cpu::kernels().noise({out.floats(), 0, out.size() / width, width, patches, seed, ids.data()});
  return out;
}

/// Computed from the definition in double precision: word 4b + j of a patch is part of Box-Muller on the block with
/// counter (b, patch, image, 0) and the seed as key.
void test_stored() {
  struct Stored {
    uint64_t seed;
    uint32_t image;
    int64_t patch;
    std::vector<double> values;
  };
  const Stored stored[] = {
      {0, 0, 0, {0.9911378, -0.9246624, -0.6176089, -0.4820686, -0.1536382, 0.1808258, 0.8317351}},
      {42, 7, 3, {-1.5246124, -1.1063323, 0.8193743, -0.3248549, -0.6137953, 0.5169790, 0.8412569}},
      {9007199254740991, 4294967295, 65535, {1.3396766, -0.3897808, -0.5473303, 1.1394024, -0.4587875, 0.7665887, 1.1101093}},
  };
  for (const Stored& s : stored) {
    const Array out(DType::Float32, 7);
    cpu::kernels().noise({out.floats(), s.patch, 1, 7, 65536, s.seed, &s.image});
    check_below(worst(out, s.values), 2e-6, "stored noise of seed " + std::to_string(s.seed) + ", image " + std::to_string(s.image) + ", patch " + std::to_string(s.patch));
  }
}

void test_distribution() {
  const Array x = noise(1, {0, 1, 2, 3}, 512, 588);
  const auto n = static_cast<double>(x.size());
  double m1 = 0, m2 = 0, m3 = 0, m4 = 0, neighbours = 0, patches = 0, largest = 0;
  for (int64_t i = 0; i < x.size(); ++i) {
    const double v = x[i];
    m1 += v / n, m2 += v * v / n, m3 += v * v * v / n, m4 += v * v * v * v / n;
    if (i + 588 < x.size()) neighbours += v * x[i + 1] / n, patches += v * x[i + 588] / n;
    largest = std::max(largest, std::abs(v));
  }
  const double deviation = 1 / std::sqrt(n);  // of a mean of n; the moments' own are that times 1, sqrt 2, sqrt 15, sqrt 96
  check_below(std::abs(m1) / deviation, 4, "mean 0, in deviations");
  check_below(std::abs(m2 - 1) / (std::sqrt(2) * deviation), 4, "variance 1, in deviations");
  check_below(std::abs(m3) / (std::sqrt(15) * deviation), 4, "third moment 0, in deviations");
  check_below(std::abs(m4 - 3) / (std::sqrt(96) * deviation), 4, "fourth moment 3, in deviations");
  check_below(std::abs(neighbours) / deviation, 4, "neighbouring columns are not correlated, in deviations");
  check_below(std::abs(patches) / deviation, 4, "neighbouring patches are not correlated, in deviations");
  check(largest > 4.5 && largest < 5.78, "the largest of a million is as large as it should be", text("%.2f", largest));

  std::vector<float> sorted(x.floats(), x.floats() + x.size());
  std::sort(sorted.begin(), sorted.end());
  double distance = 0;
  for (size_t i = 0; i < sorted.size(); ++i) {
    const double expected = std::erfc(-double{sorted[i]} / std::sqrt(2)) / 2;
    distance = std::max({distance, std::abs(expected - static_cast<double>(i) / n), std::abs(static_cast<double>(i + 1) / n - expected)});
  }
  check_below(distance * std::sqrt(n), 1.95, "Kolmogorov-Smirnov distance to the normal distribution, times sqrt n (1.95: one in a thousand)");
}

Array rows_of(const Array& x, int64_t begin, int64_t end, int64_t width) {
  return Array(DType::Float32, std::vector<float>(x.floats() + begin * width, x.floats() + end * width));
}

void test_independence() {
  const Array x = noise(7, {5, 9, 5}, 10, 49);
  check(rows_of(x, 0, 10, 49) == rows_of(x, 20, 30, 49), "an image's noise does not depend on its place in the batch");
  check(rows_of(x, 0, 10, 49) == noise(7, {5}, 10, 49), "nor on the batch");
  check(!(rows_of(x, 0, 10, 49) == rows_of(x, 10, 20, 49)), "images of different ids differ");
  const Array few = noise(7, {5}, 3, 49);
  check(rows_of(x, 0, 3, 49) == few, "nor on how many patches there are");

  const Array part(DType::Float32, 13 * 49);
  const uint32_t ids[] = {5, 9, 5};
  cpu::kernels().noise({part.floats(), 8, 13, 49, 10, 7, ids});
  check(part == rows_of(x, 8, 21, 49), "rows 8 to 20 are the same when drawn alone");

  bool same = true;
  for (int threads : {1, 3, 8}) {
    set_team_size(threads);
    same &= noise(7, {5, 9, 5}, 10, 49) == x;
  }
  check(same, "1, 3 or 8 threads give the same bits");
  check(!(noise(8, {5}, 3, 49) == few), "another seed, other noise");
  check(!(noise(7 + (uint64_t{1} << 32), {5}, 3, 49) == few), "the upper half of the seed counts");
  check(noise(7, {}, 3, 49).size() == 0, "no images, no noise");
}

/// Widths that are no multiple of four: the same numbers, cut off.
void test_widths() {
  const Array whole = noise(3, {1}, 2, 592);
  for (int64_t width : {1, 2, 3, 7, 17, 588}) {
    const Array x = noise(3, {1}, 2, width);
    bool ok = true;
    for (int64_t i = 0; i < x.size(); ++i) ok &= x[i] == whole[i / width * 592 + i % width];
    check(ok, "noise of width " + std::to_string(width));
  }
}

void test_op() {
  const auto s = session();
  check(to_array(ops::noise(s, 7, {5, 9, 5}, 10, 49)) == noise(7, {5, 9, 5}, 10, 49), "ops::noise is the kernel");
  const int threads = Device::cpu().stream().threads();
  Device::cpu().stream().set_threads(threads + 2);
  check(to_array(ops::noise(s, 7, {5, 9, 5}, 10, 49)) == noise(7, {5, 9, 5}, 10, 49), "whatever the stream's number of threads");
  Device::cpu().stream().set_threads(threads);
  const auto idle = idle_session();
  check_refused("noise of no patches", [&] { ops::noise(idle, 1, {1}, 0, 4); });
  check_refused("noise of a negative width", [&] { ops::noise(idle, 1, {1}, 4, -4); });
  check_refused("noise of more elements than 64 bits count", [&] { ops::noise(idle, 1, {1}, int64_t{1} << 40, int64_t{1} << 40); });
}

/// Parameters drawn at random: Normal(0, std) cut off at two deviations.
void test_parameters() {
  const auto s = session();
  auto draw = [&](DType dtype, bool packed, uint64_t seed, uint32_t stream) { return ops::random_parameter(s, {251, 399}, dtype, packed, seed, stream, 0.02f); };
  const Array x = to_array(draw(DType::Float32, false, 1, 2));
  const auto n = static_cast<double>(x.size());
  double mean = 0, largest = 0;
  int64_t at_the_bound = 0;
  for (int64_t i = 0; i < x.size(); ++i) {
    mean += x[i] / n;
    largest = std::max(largest, std::abs(x[i]));
    at_the_bound += std::abs(x[i]) >= 0.04 * (1 - 1e-6);
  }
  check_below(largest, 0.04 + 1e-8, "random parameters lie within two deviations");
  check_below(static_cast<double>(at_the_bound), 2, "they are cut off, not heaped up, at the bound");
  check_below(std::abs(mean) / (0.02 / std::sqrt(n)), 4, "their mean is 0, in deviations");
  check(to_array(draw(DType::Float32, false, 1, 2)) == x, "the same seed and stream give the same parameter");
  check(!(to_array(draw(DType::Float32, false, 2, 2)) == x) && !(to_array(draw(DType::Float32, false, 1, 3)) == x), "others give another");
  check(to_array(ops::unpack_linear(s, draw(DType::Float32, true, 1, 2))) == x, "packed, the values are the same");
  const Array half = to_array(draw(DType::BFloat16, false, 1, 2));
  bool rounded = true;
  for (int64_t i = 0; i < x.size(); ++i) rounded &= half[i] == double{to_float(to_bf16(x.floats()[i]))};
  check(rounded, "in bfloat16, they are rounded");
}

}  // namespace
}  // namespace uniflow::test

int main() {
  using namespace uniflow::test;
  std::printf("random, instruction set %s\n", uniflow::cpu::kernels().name);
  test_known_answers();
  test_stored();
  test_distribution();
  test_independence();
  test_widths();
  test_op();
  test_parameters();
  return finish();
}
