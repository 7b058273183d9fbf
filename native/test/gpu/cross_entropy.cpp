/// Cross-entropy on the GPU against the CPU's.
#include "native/test/gpu/gpu.h"

namespace uniflow::test {
namespace {

constexpr DType kTypes[] = {DType::BFloat16, DType::Float32};

double tolerance_of(DType dtype) { return dtype == DType::BFloat16 ? 1e-2 : 1e-5; }

/// int32, in an array of as many bytes.
DeviceArray to_device(const std::vector<int32_t>& labels) {
  Array host(DType::Int32, static_cast<int64_t>(labels.size()));
  std::memcpy(host.data(), labels.data(), labels.size() * sizeof(int32_t));
  return DeviceArray(host);
}

struct Got {
  Array grad, loss, correct;
  int64_t wrong_labels;
};

/// With logits and gradient `offset` elements into their memory.
Got run_gpu(const Array& logits, const std::vector<int32_t>& labels, int64_t classes, int64_t offset = 0) {
  const auto rows = static_cast<int64_t>(labels.size());
  const DeviceArray x(logits), y = to_device(labels), grad(logits.dtype(), logits.size());
  const DeviceArray loss(DType::Float32, 1), correct(DType::Float32, 1);
  const int64_t bytes = offset * size_of(logits.dtype());
  const int64_t wrong_labels = gpu().cross_entropy({.logits = x.as<std::byte>() + bytes,
                                                    .labels = y.as<int32_t>(),
                                                    .grad = grad.as<std::byte>() + bytes,
                                                    .dtype = logits.dtype(),
                                                    .rows = rows,
                                                    .classes = classes,
                                                    .loss = loss.as<float>(),
                                                    .correct = correct.as<float>()});
  return {grad.host(), loss.host(), correct.host(), wrong_labels};
}

Got run_cpu(const Array& logits, const std::vector<int32_t>& labels, int64_t classes, int64_t offset = 0) {
  Got got{Array(logits.dtype(), logits.size()), Array(DType::Float32, 1), Array(DType::Float32, 1), 0};
  const int64_t bytes = offset * size_of(logits.dtype());
  got.wrong_labels = cpu::kernels().cross_entropy({.logits = logits.bytes() + bytes,
                                                   .labels = labels.data(),
                                                   .grad = got.grad.bytes() + bytes,
                                                   .dtype = logits.dtype(),
                                                   .rows = static_cast<int64_t>(labels.size()),
                                                   .classes = classes,
                                                   .loss = got.loss.floats(),
                                                   .correct = got.correct.floats()});
  return got;
}

/// Every other label is that of the largest logit.
std::vector<int32_t> labels_of(const Array& logits, int64_t rows, int64_t classes, int64_t offset) {
  std::vector<int32_t> labels;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = offset + r * classes;
    int64_t label = r * 7 % classes;
    for (int64_t c = 0; r % 2 && c < classes; ++c)
      if (logits[row + c] > logits[row + label]) label = c;
    labels.push_back(static_cast<int32_t>(label));
  }
  return labels;
}

/// The gradient as it would be of the sum over the rows instead of the mean: the largest possible is one.
Array of_sum(const Array& grad, int64_t rows, int64_t offset) {
  Array out(DType::Float32, grad.size() - offset);
  for (int64_t i = offset; i < grad.size(); ++i) out.set(i - offset, grad[i] * static_cast<double>(rows));
  return out;
}

void check_case(DType dtype, int64_t rows, int64_t classes, float deviation, float mean, int64_t offset = 0) {
  const Array logits(dtype, normal(offset + rows * classes, 1, deviation, mean));
  const std::vector<int32_t> labels = labels_of(logits, rows, classes, offset);
  const Got want = run_cpu(logits, labels, classes, offset), got = run_gpu(logits, labels, classes, offset);
  const std::string title = std::string("cross_entropy ") + name_of(dtype) + " " + to_string(Shape{rows, classes}) +
                            text(", logits around %g", mean) + (offset ? ", not on 16 bytes" : "");
  check_close(got.loss, want.loss, 2e-6, title + ", loss");
  check(got.correct[0] == want.correct[0] && got.wrong_labels == 0, title + ", hits", text("%g", got.correct[0]));
  check_close(of_sum(got.grad, rows, offset), of_sum(want.grad, rows, offset), tolerance_of(dtype), title + ", gradient");
  const Got again = run_gpu(logits, labels, classes, offset);
  check(again.loss == got.loss && again.correct == got.correct, title + ", the same again");
}

/// Equal logits: the first counts as the largest, in a lane, among lanes, and in rows that are read by sweeps.
void check_ties() {
  const Array few(DType::Float32, std::vector<float>{1, 2, 2, 1, 2, 2, 5, 5, 5, -1, -2, -1});
  check(run_gpu(few, {1, 2, 0, 2}, 3).correct[0] == 2, "cross_entropy: of equal logits the first is the largest");
  for (const DType dtype : kTypes)
    for (const int64_t classes : {1000, 1001}) {
      Array x(dtype, 4 * classes);
      const int32_t labels[] = {0, 3, 998, 999};
      for (int64_t c : {3, 998}) x.set(classes + c, 4);  // row 1: its label is the first of two
      for (int64_t c : {3, 998}) x.set(2 * classes + c, 4);
      for (int64_t c : {998, 999}) x.set(3 * classes + c, 4);
      check(run_gpu(x, {std::begin(labels), std::end(labels)}, classes).correct[0] == 2,
            std::string("cross_entropy ") + name_of(dtype) + ", ties in rows of " + std::to_string(classes));
    }
}

void check_bad_values() {
  for (const int64_t classes : {3, 64}) {
    Array x(DType::Float32, normal(9 * classes, 2));
    const auto outside = static_cast<int32_t>(classes);
    const Got refused = run_gpu(x, {0, -1, 1, outside, 2, 0, 0, INT32_MIN, INT32_MAX}, classes);
    check(refused.wrong_labels == 4, "cross_entropy: labels that are no class");
    x.set(classes + 1, NAN);
    const Got got = run_gpu(x, std::vector<int32_t>(9, 0), classes);
    bool row_is_nan = true, others_are_not = true;
    for (int64_t i = 0; i < 9 * classes; ++i) {
      if (i / classes == 1) row_is_nan = row_is_nan && std::isnan(got.grad[i]);
      else others_are_not = others_are_not && !std::isnan(got.grad[i]);
    }
    check(std::isnan(got.loss[0]) && row_is_nan && others_are_not, "cross_entropy: a NaN among the logits makes loss and row NaN");
  }
  const Array masked(DType::Float32, std::vector<float>{-INFINITY, 1, 1});
  const Got got = run_gpu(masked, {1}, 3);
  check_close(got.loss, Array(DType::Float32, 1, std::log(2.0)), 1e-6, "cross_entropy: a logit of minus infinity is no class");
  check(got.grad[0] == 0, "cross_entropy: its gradient is zero");
}

}  // namespace

void check_cross_entropy() {
  for (const DType dtype : kTypes) {
    // single elements, then vectors in registers, then rows that are read by sweeps
    for (const int64_t classes : {1, 7, 17, 1025, 8, 100, 256, 1000, 2056, 4104}) {
      check_case(dtype, 7, classes, 3, 0);
      check_case(dtype, 2, classes, 30, 500);
    }
    check_case(dtype, 1, 1000, 3, 0);
    check_case(dtype, 4099, 10, 3, 0);  // more blocks than the last one has threads
    check_case(dtype, 5, 64, 3, 0, 1);
  }
  check_ties();
  check_bad_values();
}

void bench_cross_entropy() {
  const int64_t rows = emulated() ? 8 : 4096, classes = emulated() ? 64 : 1000;
  std::vector<int32_t> labels;
  for (int64_t r = 0; r < rows; ++r) labels.push_back(static_cast<int32_t>(r * 7 % classes));
  const DeviceArray y = to_device(labels), loss(DType::Float32, 1), correct(DType::Float32, 1);
  for (const DType dtype : kTypes) {
    const DeviceArray x = DeviceArray::normal(dtype, rows * classes, 3), grad(dtype, rows * classes);
    const Work work = {0, static_cast<double>(x.bytes() + grad.bytes())};
    time_gpu(to_string(Shape{rows, classes}) + ", waits", work, dtype, [&] {
      gpu().cross_entropy({.logits = x.data(),
                           .labels = y.as<int32_t>(),
                           .grad = grad.data(),
                           .dtype = dtype,
                           .rows = rows,
                           .classes = classes,
                           .loss = loss.as<float>(),
                           .correct = correct.as<float>()});
    });
  }
}

}  // namespace uniflow::test
