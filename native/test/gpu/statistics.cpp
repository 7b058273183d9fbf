/// The largest of each row, to the bit, and covariances.
#include "native/test/gpu/gpu.h"

namespace uniflow::test {
namespace {

struct TopK {
  int64_t rows, n, k;
  std::string text() const { return std::to_string(k) + " of " + std::to_string(n) + ", " + std::to_string(rows) + " rows"; }
};

/// NaN too must be where it is on the CPU, so bytes are compared.
void check_top_k(const TopK& t, const Array& scores, const std::string& kind) {
  const Array values(DType::Float32, t.rows * t.k), indices(DType::Int32, t.rows * t.k);
  const DeviceArray in(scores), on_values(DType::Float32, values.size()), on_indices(DType::Int32, indices.size());
  cpu::kernels().top_k(scores.floats(), t.rows, t.n, t.k, values.floats(), static_cast<int32_t*>(indices.data()));
  gpu().top_k(in.as<float>(), t.rows, t.n, t.k, on_values.as<float>(), on_indices.as<int32_t>());
  check(on_indices.host() == indices, "top k: indices of " + t.text() + ", " + kind);
  check(on_values.host() == values, "top k: values of " + t.text() + ", " + kind);
}

void check_top_k(const TopK& t) {
  const int64_t count = t.rows * t.n;
  Array random(DType::Float32, normal(count, 1)), few(DType::Float32, count), special(DType::Float32, count), alike(DType::Float32, count);
  const float odd[] = {0.0f, -0.0f, INFINITY, -INFINITY, NAN, -NAN, 1e-42f, -1e-42f, 3e38f, 1.0f, -1.0f};
  for (int64_t i = 0; i < count; ++i) {
    few.set(i, static_cast<double>(i * 7919 % 5 - 2));
    special.floats()[i] = odd[i * 31 % 11];
    alike.set(i, 1 + 1e-7 * static_cast<double>(i * 7919 % 64));
  }
  check_top_k(t, random, "random");
  check_top_k(t, few, "five different values");
  check_top_k(t, special, "special values");
  check_top_k(t, alike, "values that differ in the last bits");
}

void check_covariance(int64_t rows, int64_t width, float mean) {
  Array x(DType::Float32, normal(rows * width, 2, 1, mean));
  for (int64_t i = 0; i + 1 < x.size(); i += 2) x.set(i, x[i] + 0.5 * x[i + 1]);  // columns that have something in common
  const Array want_mean(DType::Float32, width), want(DType::Float32, width * width);
  const DeviceArray in(x), out_mean(DType::Float32, width), out(DType::Float32, width * width);
  cpu::kernels().covariance(x.floats(), rows, width, want_mean.floats(), want.floats());
  gpu().covariance(in.as<float>(), rows, width, out_mean.as<float>(), out.as<float>());
  const std::string name = std::to_string(rows) + " x " + std::to_string(width) + ", mean " + text("%g", double{mean});
  check_close(out_mean.host(), want_mean, 1e-6, "mean of " + name);
  const Array got = out.host();
  check_close(got, want, 1e-6, "covariance of " + name);
  bool symmetric = true;
  for (int64_t i = 0; i < width; ++i)
    for (int64_t j = 0; j < i; ++j) symmetric &= got[i * width + j] == got[j * width + i];
  check(symmetric, "covariance of " + name + " is symmetric");
}

}  // namespace

void check_statistics() {
  for (const TopK& t : {TopK{1, 1, 1}, {7, 17, 1}, {7, 17, 17}, {3, 1025, 20}, {2, 1024, 33}, {3, 3000, 2500}}) check_top_k(t);
  check_top_k({3, 2049, 2049}, Array(DType::Float32, normal(3 * 2049, 3)), "random");
  if (!emulated()) check_top_k({1000, 50000, 20});
  for (const auto& [rows, width] : {std::pair<int64_t, int64_t>{2, 1}, {17, 7}, {33, 64}, {1025, 65}, {130, 130}})
    for (const float mean : {0.0f, 1000.0f}) check_covariance(rows, width, mean);
}

void bench_statistics() {
  const int64_t rows = emulated() ? 2 : 256, n = emulated() ? 100 : 65536, k = 20;
  const DeviceArray scores = DeviceArray::normal(DType::Float32, rows * n), values(DType::Float32, rows * k), indices(DType::Int32, rows * k);
  time_gpu("top k, 20 of " + std::to_string(rows) + "x" + std::to_string(n), {.flops = 0, .bytes = static_cast<double>(scores.bytes())}, DType::Float32,
           [&] { gpu().top_k(scores.as<float>(), rows, n, k, values.as<float>(), indices.as<int32_t>()); });
  const int64_t samples = emulated() ? 10 : 10000, width = emulated() ? 10 : 2048;
  const DeviceArray x = DeviceArray::normal(DType::Float32, samples * width), mean(DType::Float32, width), out(DType::Float32, width * width);
  const double flops = static_cast<double>(samples) * static_cast<double>(width) * static_cast<double>(width + 1);
  time_gpu("covariance " + std::to_string(samples) + "x" + std::to_string(width) + " (in float64)", {.flops = flops, .bytes = static_cast<double>(x.bytes())},
           DType::Float32, [&] { gpu().covariance(x.as<float>(), samples, width, mean.as<float>(), out.as<float>()); });
}

}  // namespace uniflow::test
