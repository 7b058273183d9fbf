/// Tests attention's backward pass, and the log-sum-exp that its forward pass hands it, for the instruction set in use
/// (environment variable UNIFLOW_ISA): against the derivatives written out in double precision, those against finite
/// differences, and the promise that the gradient of an image depends neither on its batch, nor on the run, nor on the
/// number of threads.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "native/core/team.h"
#include "native/cpu/kernels.h"
#include "native/test/check.h"

namespace uniflow::test {
namespace {

using Doubles = std::vector<double>;

struct Sizes {
  int64_t batch, seq, heads, head_dim;

  int64_t width() const { return heads * head_dim; }
  int64_t rows() const { return batch * seq; }
  /// Where the row of a head's token starts in a matrix of rows of `parts` * width elements, in its part `part`.
  size_t at(int64_t image, int64_t head, int64_t token, int64_t parts = 1, int64_t part = 0) const {
    return static_cast<size_t>(((image * seq + token) * parts + part) * width() + head * head_dim);
  }
  std::string text() const {
    return "batch " + std::to_string(batch) + " seq " + std::to_string(seq) + " heads " + std::to_string(heads) +
           " width " + std::to_string(head_dim);
  }
};

float scale_of(const Sizes& s) { return 1.0f / std::sqrt(static_cast<float>(s.head_dim)); }

double dot(const double* a, const double* b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

void add_scaled(double* to, double factor, const double* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] += factor * from[i];
}

/// The forward pass in double precision: out and log_sum_exp.
struct Reference {
  Doubles out, log_sum_exp;

  Reference(const Sizes& s, const Doubles& qkv, double scale)
      : out(static_cast<size_t>(s.rows() * s.width())), log_sum_exp(static_cast<size_t>(s.rows() * s.heads)) {
    Doubles p(static_cast<size_t>(s.seq));
    for (int64_t image = 0; image < s.batch; ++image)
      for (int64_t head = 0; head < s.heads; ++head)
        for (int64_t token = 0; token < s.seq; ++token) {
          const double* q = &qkv[s.at(image, head, token, 3, 0)];
          for (int64_t j = 0; j < s.seq; ++j)
            p[static_cast<size_t>(j)] = scale * dot(q, &qkv[s.at(image, head, j, 3, 1)], s.head_dim);
          const double maximum = *std::max_element(p.begin(), p.end());
          double sum = 0;
          for (double& w : p) sum += w = std::exp(w - maximum);
          for (int64_t j = 0; j < s.seq; ++j)
            add_scaled(&out[s.at(image, head, token)], p[static_cast<size_t>(j)] / sum, &qkv[s.at(image, head, j, 3, 2)], s.head_dim);
          log_sum_exp[static_cast<size_t>((image * s.heads + head) * s.seq + token)] = maximum + std::log(sum);
        }
  }
};

/// d_qkv in double precision.
Doubles reference_backward(const Sizes& s, const Doubles& qkv, const Doubles& d_out, double scale) {
  const Reference forward(s, qkv, scale);
  Doubles d_qkv(qkv.size());
  for (int64_t image = 0; image < s.batch; ++image)
    for (int64_t head = 0; head < s.heads; ++head)
      for (int64_t i = 0; i < s.seq; ++i) {
        const double* d = &d_out[s.at(image, head, i)];
        const double* q = &qkv[s.at(image, head, i, 3, 0)];
        const double delta = dot(d, &forward.out[s.at(image, head, i)], s.head_dim);
        const double log_sum = forward.log_sum_exp[static_cast<size_t>((image * s.heads + head) * s.seq + i)];
        for (int64_t j = 0; j < s.seq; ++j) {
          const double* k = &qkv[s.at(image, head, j, 3, 1)];
          const double p = std::exp(scale * dot(q, k, s.head_dim) - log_sum);
          const double d_s = scale * p * (dot(d, &qkv[s.at(image, head, j, 3, 2)], s.head_dim) - delta);
          add_scaled(&d_qkv[s.at(image, head, i, 3, 0)], d_s, k, s.head_dim);
          add_scaled(&d_qkv[s.at(image, head, j, 3, 1)], d_s, q, s.head_dim);
          add_scaled(&d_qkv[s.at(image, head, j, 3, 2)], p, d, s.head_dim);
        }
      }
  return d_qkv;
}

/// d (out . d_out) / d qkv by central differences of the forward pass.
Doubles finite_differences(const Sizes& s, Doubles qkv, const Doubles& d_out, double scale) {
  const double step = 1e-5;
  const auto loss = [&] {
    const Reference forward(s, qkv, scale);
    return dot(forward.out.data(), d_out.data(), static_cast<int64_t>(d_out.size()));
  };
  Doubles slope(qkv.size());
  for (size_t i = 0; i < qkv.size(); ++i) {
    const double x = qkv[i];
    qkv[i] = x + step;
    const double above = loss();
    qkv[i] = x - step;
    slope[i] = (above - loss()) / (2 * step);
    qkv[i] = x;
  }
  return slope;
}

Doubles doubles(const Array& a) {
  Doubles out(static_cast<size_t>(a.size()));
  for (int64_t i = 0; i < a.size(); ++i) out[static_cast<size_t>(i)] = a[i];
  return out;
}

/// |got - want| / |want| over part q, k or v of [rows, 3 * width]; the root mean square of got where all should be zero.
double relative_error(const Sizes& s, const Doubles& got, const Doubles& want, int64_t part) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    if (static_cast<int64_t>(i) / s.width() % 3 != part) continue;
    difference += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  return std::sqrt(difference / (norm == 0 ? static_cast<double>(s.rows() * s.width()) : norm));
}

struct Case {
  Sizes sizes;
  Array qkv, d_out, out, log_sum_exp;

  Case(DType dtype, const Sizes& s, float deviation)
      : Case(s, Array(dtype, normal(s.rows() * 3 * s.width(), seed(s), deviation)),
             Array(dtype, normal(s.rows() * s.width(), seed(s) + 1))) {}

  Case(const Sizes& s, Array input, Array gradient)
      : sizes(s), qkv(std::move(input)), d_out(std::move(gradient)), out(qkv.dtype(), s.rows() * s.width(), NAN),
        log_sum_exp(DType::Float32, s.rows() * s.heads, NAN) {
    forward(out, log_sum_exp.floats());
  }

  static unsigned seed(const Sizes& s) { return static_cast<unsigned>(s.seq * 131 + s.heads * 17 + s.head_dim); }

  void forward(Array& to, float* sums) const {
    cpu::kernels().attention({.qkv = qkv.data(), .out = to.data(), .dtype = qkv.dtype(), .batch = sizes.batch, .seq = sizes.seq,
                              .heads = sizes.heads, .head_dim = sizes.head_dim, .scale = scale_of(sizes), .log_sum_exp = sums});
  }

  Array backward() const {
    Array d_qkv(qkv.dtype(), qkv.size(), NAN);  // what is left out shows
    cpu::kernels().attention_backward({.qkv = qkv.data(), .out = out.data(), .d_out = d_out.data(), .log_sum_exp = log_sum_exp.floats(),
                                       .d_qkv = d_qkv.data(), .dtype = qkv.dtype(), .batch = sizes.batch, .seq = sizes.seq,
                                       .heads = sizes.heads, .head_dim = sizes.head_dim, .scale = scale_of(sizes)});
    return d_qkv;
  }

  Case image(int64_t i) const {
    Sizes one = sizes;
    one.batch = 1;
    return Case(one, slice(qkv, i), slice(d_out, i));
  }

  /// The part of one image in an array of the whole batch.
  Array slice(const Array& of, int64_t image) const {
    const int64_t n = of.size() / sizes.batch;
    Array part(of.dtype(), n);
    for (int64_t i = 0; i < n; ++i) part.set(i, of[image * n + i]);
    return part;
  }
};

/// Whether each image alone gives the bits that it has in the batch.
bool independent(const Case& all, const Array& d_qkv) {
  for (int64_t image = 0; image < all.sizes.batch; ++image)
    if (!(all.image(image).backward() == all.slice(d_qkv, image))) return false;
  return true;
}

/// Whether numbers of threads that split the heads in other ways give the same bits.
bool same_with_threads(const Case& c, const Array& d_qkv) {
  const int usual = team_size();
  bool same = true;
  for (int threads : {1, 2, 5}) {
    set_team_size(threads);
    same &= c.backward() == d_qkv;
  }
  set_team_size(usual);
  return same;
}

void test_case(DType dtype, const Sizes& s, float deviation = 1) {
  const bool single = dtype == DType::Float32;
  const std::string name = std::string(name_of(dtype)) + " " + s.text() + (deviation > 1 ? ", peaked" : "");
  const Case c(dtype, s, deviation);
  const double scale = double{scale_of(s)};
  const Reference forward(s, doubles(c.qkv), scale);
  const Array d_qkv = c.backward();
  const Doubles got = doubles(d_qkv), want = reference_backward(s, doubles(c.qkv), doubles(c.d_out), scale);
  double error = 0;
  for (int64_t part = 0; part < 3; ++part) {
    const double e = relative_error(s, got, want, part);
    if (!(e <= error)) error = e;
  }
  check_below(error, single ? 5e-6 : 1.5e-2, name);
  check_below(worst(c.log_sum_exp, forward.log_sum_exp), single ? 1e-6 : 1e-3, name + ", log_sum_exp");

  Array plain(dtype, c.out.size(), NAN);
  c.forward(plain, nullptr);
  check(plain == c.out, name + ", the same output without log_sum_exp");
  check(c.backward() == d_qkv, name + ", runs agree");
  check(same_with_threads(c, d_qkv), name + ", numbers of threads agree");
  if (s.batch > 1) check(independent(c, d_qkv), name + ", images alone as in the batch");
}

/// The derivatives that everything else is held against.
void test_reference() {
  const Sizes s{2, 5, 2, 3};
  const std::vector<float> a = normal(s.rows() * 3 * s.width(), 1), b = normal(s.rows() * s.width(), 2);
  const Doubles qkv(a.begin(), a.end()), d_out(b.begin(), b.end());
  const Doubles got = reference_backward(s, qkv, d_out, 0.6), want = finite_differences(s, qkv, d_out, 0.6);
  for (int64_t part = 0; part < 3; ++part)
    check_below(relative_error(s, got, want, part), 1e-8, std::string("reference against finite differences, d_") + "qkv"[part]);
}

/// A NaN in d_out shows in all of its head's keys, and in no other head.
void test_nan(DType dtype) {
  const Sizes s{2, 40, 2, 8};
  Case c(dtype, s, 1);
  c.d_out.set(static_cast<int64_t>(s.at(1, 1, 7)), NAN);
  const Array d_qkv = c.backward();
  bool right = true;
  for (int64_t image = 0; image < s.batch; ++image)
    for (int64_t head = 0; head < s.heads; ++head)
      for (int64_t token = 0; token < s.seq; ++token)
        right &= std::isnan(d_qkv[static_cast<int64_t>(s.at(image, head, token, 3, 1))]) == (image == 1 && head == 1);
  check(right, std::string(name_of(dtype)) + " NaN in d_out shows in its head alone");
}

void test_all(DType dtype) {
  for (int64_t head_dim : {1, 3, 16, 17, 64, 80})
    for (int64_t seq : {1, 7, 17, 197}) test_case(dtype, {3, seq, 3, head_dim});
  for (int64_t head_dim : {2, 31, 33, 88, 128, 256}) test_case(dtype, {2, 50, 1, head_dim});
  for (int64_t seq : {2, 12, 13, 24, 25, 191, 192, 193, 257, 383, 385}) test_case(dtype, {2, seq, 1, 24});  // around blocks
  test_case(dtype, {1, 257, 12, 64});
  test_case(dtype, {1, 1025, 3, 64});
  test_case(dtype, {2, 197, 3, 64}, 3);
  test_nan(dtype);
}

}  // namespace
}  // namespace uniflow::test

int main() {
  std::printf("attention backward, instruction set %s\n", uniflow::cpu::kernels().name);
  uniflow::test::test_reference();
  uniflow::test::test_all(uniflow::DType::Float32);
  uniflow::test::test_all(uniflow::DType::BFloat16);
  return uniflow::test::finish();
}
