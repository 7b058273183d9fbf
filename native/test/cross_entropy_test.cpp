/// Cross-entropy, loss, gradient and hits, of the instruction set in use (environment variable UNIFLOW_ISA), against double precision.
#include "native/cpu/kernels.h"
#include "native/ops/elementwise.h"
#include "native/ops/losses.h"
#include "native/test/check.h"

namespace uniflow::test {
namespace {

Tensor to_labels(const std::vector<int32_t>& labels) {
  Tensor t(DType::Int32, {static_cast<int64_t>(labels.size())});
  t.buffer()->allocate();
  std::memcpy(t.data(), labels.data(), labels.size() * sizeof(int32_t));
  return t;
}

struct Want {
  double loss = 0, correct = 0;
  std::vector<double> grad;
};

Want plain(const Array& x, const std::vector<int32_t>& labels, int64_t classes) {
  Want w;
  const auto rows = static_cast<int64_t>(labels.size());
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t label = labels[static_cast<size_t>(r)];
    double top = x[r * classes], total = 0;
    int64_t at = 0;
    for (int64_t c = 1; c < classes; ++c)
      if (x[r * classes + c] > top) top = x[r * classes + (at = c)];
    for (int64_t c = 0; c < classes; ++c) total += std::exp(x[r * classes + c] - top);
    w.loss += (std::log(total) + top - x[r * classes + label]) / static_cast<double>(rows);
    w.correct += at == label;
    for (int64_t c = 0; c < classes; ++c) w.grad.push_back((std::exp(x[r * classes + c] - top) / total - (c == label)) / static_cast<double>(rows));
  }
  return w;
}

void test_values(DType dtype, int64_t rows, int64_t classes, float deviation, float mean) {
  const Array x(dtype, normal(rows * classes, 1, deviation, mean));
  std::vector<int32_t> labels;
  for (int64_t r = 0; r < rows; ++r) {  // every other row is right
    int64_t label = r * 7 % classes;
    if (r % 2)
      for (int64_t c = 0; c < classes; ++c)
        if (x[r * classes + c] > x[r * classes + label]) label = c;
    labels.push_back(static_cast<int32_t>(label));
  }
  const auto got = ops::cross_entropy(session(), to_tensor(x, {rows, classes}), to_labels(labels));
  const Want want = plain(x, labels, classes);
  const std::string name = std::string("cross-entropy ") + name_of(dtype) + " " + to_string({rows, classes}) + text(", logits around %g", mean);
  check_below(worst(to_array(got.loss), {want.loss}), 32 * 0x1p-24, name + ", loss");
  check(to_array(got.correct)[0] == want.correct, name + ", hits");
  // of each element, relative to the largest possible one, 1 / rows
  double error = 0;
  const Array grad = to_array(got.grad);
  for (int64_t i = 0; i < grad.size(); ++i) {
    const double w = want.grad[static_cast<size_t>(i)];
    error = std::max(error, std::abs(grad[i] - w) / (dtype == DType::BFloat16 ? std::abs(w) + 1e-3 / static_cast<double>(rows) : 1 / static_cast<double>(rows)));
  }
  check_below(error, floor_of(dtype, 32), name + ", gradient");
}

/// Equal logits: the first counts as the largest.
void test_ties() {
  const Tensor x = to_tensor(DType::Float32, {4, 3}, {1, 2, 2, 1, 2, 2, 5, 5, 5, -1, -2, -1});
  check(to_array(ops::cross_entropy(session(), x, to_labels({1, 2, 0, 2})).correct)[0] == 2, "of equal logits the first is the largest");
}

void test_bad_values() {
  const auto s = session();
  const Tensor x = to_tensor(DType::Float32, {2, 3}, {1, 2, 3, 4, 5, 6});
  for (int32_t label : {-1, 3}) {
    const auto bad = ops::cross_entropy(s, x, to_labels({0, label}));
    for (const Tensor& t : {bad.loss, bad.grad, bad.correct}) {
      const auto failure = wait(t);
      check(failure && failure->code == ErrorCode::BadInput && failure->subject == "labels" && failure->op == "crossEntropy",
            "a label of " + std::to_string(label) + " fails the results", failure ? failure->what() : "no failure");
    }
  }
  const Tensor broken = to_tensor(DType::Float32, {2, 3}, {1, NAN, 3, 4, 5, 6});
  check(std::isnan(to_array(ops::cross_entropy(s, broken, to_labels({0, 0})).loss)[0]), "a NaN among the logits makes the loss NaN");
  const Tensor masked = to_tensor(DType::Float32, {1, 3}, {-INFINITY, 1, 1});
  check_below(std::abs(to_array(ops::cross_entropy(s, masked, to_labels({1})).loss)[0] - std::log(2.0)), 1e-6, "a logit of minus infinity is no class");
}

void test_refusals() {
  const auto s = idle_session();
  const Tensor x(DType::Float32, {2, 3}), labels(DType::Int32, {2});
  check_refused("too few labels", [&] { ops::cross_entropy(s, x, Tensor(DType::Int32, {1})); });
  check_refused("float labels", [&] { ops::cross_entropy(s, x, Tensor(DType::Float32, {2})); });
  check_refused("logits of one dimension", [&] { ops::cross_entropy(s, Tensor(DType::Float32, {2}), labels); });
  check_refused("no rows", [&] { ops::cross_entropy(s, Tensor(DType::Float32, {0, 3}), Tensor(DType::Int32, {0})); });
  check_refused("no classes", [&] { ops::cross_entropy(s, Tensor(DType::Float32, {2, 0}), labels); });
}

}  // namespace
}  // namespace uniflow::test

int main() {
  using namespace uniflow;
  using namespace uniflow::test;
  std::printf("cross-entropy, instruction set %s\n", cpu::kernels().name);
  for (DType dtype : {DType::Float32, DType::BFloat16})
    for (int64_t classes : {1, 7, 17, 1025})
      for (int64_t rows : {1, 7, 65}) {
        test_values(dtype, rows, classes, 3, 0);
        test_values(dtype, rows, classes, 30, 500);
      }
  test_ties();
  test_bad_values();
  test_refusals();
  return finish();
}
