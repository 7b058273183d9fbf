/// Tests the attention kernel of the instruction set in use (environment variable UNIFLOW_ISA) against
/// softmax(q k^T * scale) v in double precision, and its promises: the result of an image depends neither
/// on its batch nor on the run.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "native/core/dtype.h"
#include "native/cpu/kernels.h"

namespace uniflow {
namespace {

int passed = 0, failed = 0;

void check(bool ok, const std::string& name, const std::string& detail) {
  ++(ok ? passed : failed);
  std::printf("%s %s: %s\n", ok ? "ok  " : "FAIL", name.c_str(), detail.c_str());
}

bf16 convert(float v, bf16) { return to_bf16(v); }
float convert(float v, float) { return v; }
DType dtype_of(bf16) { return DType::BFloat16; }
DType dtype_of(float) { return DType::Float32; }

struct Shape {
  int64_t batch, seq, heads, head_dim;

  int64_t in_row() const { return 3 * heads * head_dim; }
  int64_t in_size() const { return batch * seq * in_row(); }
  int64_t out_size() const { return batch * seq * heads * head_dim; }
  std::string text() const {
    return "batch " + std::to_string(batch) + " seq " + std::to_string(seq) + " heads " + std::to_string(heads) +
           " width " + std::to_string(head_dim);
  }
};

/// A heap array of exactly `n` elements, so that the address sanitizer detects access past the end.
template <class T>
std::unique_ptr<T[]> array(int64_t n) {
  return std::make_unique<T[]>(static_cast<size_t>(n));
}

template <class T>
std::unique_ptr<T[]> normal_input(const Shape& s, float deviation) {
  std::mt19937 random(static_cast<unsigned>(s.seq * 131 + s.heads * 17 + s.head_dim));
  std::normal_distribution<float> normal(0, deviation);
  auto qkv = array<T>(s.in_size());
  for (int64_t i = 0; i < s.in_size(); ++i) qkv[i] = convert(normal(random), T{});
  return qkv;
}

template <class T>
std::unique_ptr<T[]> run(const Shape& s, const T* qkv, float scale) {
  auto out = array<T>(s.out_size());
  std::fill_n(out.get(), s.out_size(), convert(NAN, T{}));  // what is left out shows
  cpu::kernels().attention({qkv, out.get(), dtype_of(T{}), s.batch, s.seq, s.heads, s.head_dim, scale});
  return out;
}

/// Row `token` of one head of one image, in double precision.
template <class T>
std::vector<double> reference(const Shape& s, const T* qkv, float scale, int64_t image, int64_t head,
                              int64_t token) {
  const T* rows = qkv + image * s.seq * s.in_row() + head * s.head_dim;
  const T* q = rows + token * s.in_row();
  std::vector<double> weights(static_cast<size_t>(s.seq)), out(static_cast<size_t>(s.head_dim));
  for (int64_t j = 0; j < s.seq; ++j) {
    const T* k = rows + j * s.in_row() + s.heads * s.head_dim;
    double score = 0;
    for (int64_t e = 0; e < s.head_dim; ++e) score += double{to_float(q[e])} * double{to_float(k[e])};
    weights[static_cast<size_t>(j)] = score * double{scale};
  }
  const double maximum = *std::max_element(weights.begin(), weights.end());
  double sum = 0;
  for (double& w : weights) sum += w = std::exp(w - maximum);
  for (int64_t j = 0; j < s.seq; ++j) {
    const T* v = rows + j * s.in_row() + 2 * s.heads * s.head_dim;
    for (int64_t e = 0; e < s.head_dim; ++e)
      out[static_cast<size_t>(e)] += weights[static_cast<size_t>(j)] / sum * double{to_float(v[e])};
  }
  return out;
}

/// Relative L2 error over every image and head, and over about `rows` rows of each, the last included.
template <class T>
double error_of(const Shape& s, const T* qkv, const T* out, float scale, int64_t rows) {
  double difference = 0, norm = 0;
  const int64_t step = std::max<int64_t>(1, s.seq / rows);
  for (int64_t image = 0; image < s.batch; ++image)
    for (int64_t head = 0; head < s.heads; ++head)
      for (int64_t token = s.seq - 1; token >= 0; token -= step) {
        const auto expected = reference(s, qkv, scale, image, head, token);
        const T* row = out + ((image * s.seq + token) * s.heads + head) * s.head_dim;
        for (int64_t e = 0; e < s.head_dim; ++e) {
          const double d = double{to_float(row[e])} - expected[static_cast<size_t>(e)];
          difference += d * d;
          norm += expected[static_cast<size_t>(e)] * expected[static_cast<size_t>(e)];
        }
      }
  return std::sqrt(difference / norm);
}

template <class T>
bool all_finite(const T* values, int64_t n) {
  return std::all_of(values, values + n, [](T v) { return std::isfinite(to_float(v)); });
}

template <class T>
void test_shape(const Shape& s, float deviation, const std::string& name) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(s.head_dim));
  const double floor = dtype_of(T{}) == DType::Float32 ? 2e-6 : 6e-3;
  const auto qkv = normal_input<T>(s, deviation);
  const auto out = run(s, qkv.get(), scale);
  const double error = error_of(s, qkv.get(), out.get(), scale, 24);
  const bool finite = all_finite(out.get(), s.out_size());
  const bool repeats = std::memcmp(out.get(), run(s, qkv.get(), scale).get(),
                                   static_cast<size_t>(s.out_size()) * sizeof(T)) == 0;
  bool independent = true;
  Shape one = s;
  one.batch = 1;
  for (int64_t image = 0; image < s.batch && s.batch > 1; ++image) {
    auto alone = array<T>(one.in_size());
    std::copy_n(qkv.get() + image * one.in_size(), one.in_size(), alone.get());
    independent &= std::memcmp(run(one, alone.get(), scale).get(), out.get() + image * one.out_size(),
                               static_cast<size_t>(one.out_size()) * sizeof(T)) == 0;
  }
  char detail[128];
  std::snprintf(detail, sizeof detail, "relative error %.2e (floor %.0e)%s%s%s", error, floor,
                finite ? "" : ", NOT FINITE", repeats ? "" : ", RUNS DIFFER",
                independent ? "" : ", DEPENDS ON THE BATCH");
  check(error <= floor && finite && repeats && independent,
        std::string(name_of(dtype_of(T{}))) + " " + s.text() + name, detail);
}

/// Logits of +-80 exactly: the output is the mean of v over the keys of the right sign.
template <class T>
void test_large_logits() {
  const Shape s{1, 300, 2, 16};
  auto qkv = normal_input<T>(s, 1);
  for (int64_t token = 0; token < s.seq; ++token)
    for (int64_t i = 0; i < 2 * s.heads * s.head_dim; ++i) {
      const bool key = i >= s.heads * s.head_dim;
      qkv[token * s.in_row() + i] = convert((key ? token % 3 : token % 2) == 0 ? -1.0f : 1.0f, T{});
    }
  const float scale = 80.0f / static_cast<float>(s.head_dim);
  const auto out = run(s, qkv.get(), scale);
  const double error = error_of(s, qkv.get(), out.get(), scale, s.seq);
  char detail[64];
  std::snprintf(detail, sizeof detail, "relative error %.2e", error);
  check(all_finite(out.get(), s.out_size()) && error < (dtype_of(T{}) == DType::Float32 ? 2e-6 : 6e-3),
        std::string(name_of(dtype_of(T{}))) + " logits of +-80", detail);
}

/// A NaN in one query row shows in that row and in no other.
template <class T>
void test_nan() {
  const Shape s{1, 40, 1, 8};
  auto qkv = normal_input<T>(s, 1);
  qkv[5 * s.in_row()] = convert(NAN, T{});
  const auto out = run(s, qkv.get(), 0.5f);
  bool ok = true;
  for (int64_t i = 0; i < s.out_size(); ++i) ok &= std::isnan(to_float(out[i])) == (i / s.head_dim == 5);
  check(ok, std::string(name_of(dtype_of(T{}))) + " NaN in a query", ok ? "its row alone is NaN" : "WRONG ROWS");
}

template <class T>
void test_all() {
  for (int64_t head_dim : {1, 3, 7, 12, 16, 17, 32, 64, 80, 88, 128})
    for (int64_t seq : {1, 7, 17, 197}) test_shape<T>({3, seq, 3, head_dim}, 1, "");
  for (int64_t head_dim : {17, 64, 88}) test_shape<T>({1, 1025, 3, head_dim}, 1, "");
  for (int64_t seq : {1, 7, 383, 384, 385, 640}) test_shape<T>({1, seq, 1, 24}, 1, "");  // around key blocks
  test_shape<T>({3, 197, 16, 64}, 1, "");
  test_shape<T>({1, 1025, 16, 64}, 1, "");
  test_shape<T>({1, 50, 2, 256}, 1, "");
  test_shape<T>({2, 197, 3, 64}, 3, ", peaked");
  test_large_logits<T>();
  test_nan<T>();
}

}  // namespace
}  // namespace uniflow

int main() {
  std::printf("attention, instruction set %s\n", uniflow::cpu::kernels().name);
  uniflow::test_all<float>();
  uniflow::test_all<uniflow::bf16>();
  std::printf("%d passed, %d failed\n", uniflow::passed, uniflow::failed);
  return uniflow::failed == 0 ? 0 : 1;
}
