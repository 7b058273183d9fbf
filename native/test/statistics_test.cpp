/// The largest of each row, and covariance, of the instruction set in use (environment variable UNIFLOW_ISA), against plain loops.
#include "native/ops/statistics.h"

#include <numeric>

#include "native/core/team.h"
#include "native/cpu/kernels.h"
#include "native/test/check.h"

namespace uniflow::test {
namespace {

void test_top_k(int64_t rows, int64_t n, int64_t k, float levels) {
  std::vector<float> scores = normal(rows * n, 1);
  for (float& s : scores) s = std::round(s * levels) / levels;  // few levels: many are equal
  const auto top = ops::top_k(session(), to_tensor(DType::Float32, {rows, n}, scores), k);
  const Array values = to_array(top.values);
  wait(top.indices);
  bool ok = top.indices.shape() == Shape{rows, k};
  for (int64_t r = 0; r < rows; ++r) {
    const float* s = scores.data() + r * n;
    std::vector<int32_t> order(static_cast<size_t>(n));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [s](int32_t a, int32_t b) { return s[a] > s[b]; });
    for (int64_t i = 0; i < k; ++i) {
      const int32_t want = order[static_cast<size_t>(i)];
      ok &= top.indices.data<int32_t>()[r * k + i] == want && values[r * k + i] == double{s[want]};
    }
  }
  check(ok, "top " + std::to_string(k) + " of " + to_string({rows, n}) + text(", steps of 1/%g", levels));
}

void test_top_k_of_nan() {
  const auto top = ops::top_k(session(), to_tensor(DType::Float32, {1, 4}, {NAN, 1, -INFINITY, 2}), 4);
  const Array values = to_array(top.values);
  check(values[0] == 2 && values[1] == 1 && std::isnan(values[2]) && std::isinf(values[3]), "NaN is as low as minus infinity");
}

void test_covariance(int64_t rows, int64_t width, float mean) {
  const Array x(DType::Float32, normal(rows * width, 2, 1, mean));
  const auto got = ops::covariance(session(), to_tensor(x, {rows, width}));
  std::vector<double> centre(static_cast<size_t>(width)), want(static_cast<size_t>(width * width));
  for (int64_t i = 0; i < rows * width; ++i) centre[static_cast<size_t>(i % width)] += x[i] / static_cast<double>(rows);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < width; ++i)
      for (int64_t j = 0; j < width; ++j)
        want[static_cast<size_t>(i * width + j)] += (x[r * width + i] - centre[static_cast<size_t>(i)]) * (x[r * width + j] - centre[static_cast<size_t>(j)]) / static_cast<double>(rows - 1);
  const std::string name = "covariance of " + to_string({rows, width}) + text(" around %g", mean);
  check_below(worst(to_array(got.mean), centre), 0x1p-24, name + ", mean");
  check_below(worst(to_array(got.covariance), want), 0x1p-24, name);
}

/// The sums have one order, whatever the threads.
void test_threads() {
  const Tensor x = to_tensor(DType::Float32, {1025, 65}, normal(1025 * 65, 3));
  Device::cpu().stream().set_threads(1);
  const Array one = to_array(ops::covariance(session(), x).covariance);
  Device::cpu().stream().set_threads(3);
  const Array three = to_array(ops::covariance(session(), x).covariance);
  Device::cpu().stream().set_threads(default_threads());
  check(one == three, "the same covariance from one thread and from three");
}

void test_refusals() {
  const auto s = idle_session();
  const Tensor x(DType::Float32, {3, 4});
  check_refused("the top 0", [&] { ops::top_k(s, x, 0); });
  check_refused("the top 5 of 4", [&] { ops::top_k(s, x, 5); });
  check_refused("bfloat16 scores", [&] { ops::top_k(s, Tensor(DType::BFloat16, {3, 4}), 1); });
  check_refused("the covariance of one row", [&] { ops::covariance(s, Tensor(DType::Float32, {1, 4})); });
  check_refused("the covariance of no column", [&] { ops::covariance(s, Tensor(DType::Float32, {4, 0})); });
  check_refused("the covariance of bfloat16", [&] { ops::covariance(s, Tensor(DType::BFloat16, {3, 4})); });
}

}  // namespace
}  // namespace uniflow::test

int main() {
  using namespace uniflow;
  using namespace uniflow::test;
  std::printf("statistics, instruction set %s\n", cpu::kernels().name);
  for (int64_t rows : {1, 7})
    for (int64_t n : {1, 7, 17, 1025})
      for (int64_t k : {int64_t{1}, std::min<int64_t>(n, 5), n})
        for (float levels : {2.0f, 1e6f}) test_top_k(rows, n, k, levels);
  test_top_k_of_nan();
  for (int64_t width : {1, 7, 17, 100})
    for (int64_t rows : {2, 7, 257, 1025})
      for (float mean : {0.0f, 1000.0f}) test_covariance(rows, width, mean);
  test_threads();
  test_refusals();
  return finish();
}
