/// attention and attention_backward on the GPU against the CPU's.
#include <cmath>

#include "native/test/gpu/gpu.h"

namespace uniflow::test {
namespace {

struct Sizes {
  int64_t batch, seq, heads, head_dim;

  int64_t tokens() const { return batch * seq; }
  int64_t width() const { return heads * head_dim; }
  std::string text() const {
    return "[" + std::to_string(batch) + ", " + std::to_string(seq) + ", " + std::to_string(heads) + " x " + std::to_string(head_dim) + "]";
  }
  float scale() const { return 1.0f / std::sqrt(static_cast<float>(head_dim)); }
};

/// The emulator is given fewer combinations: each length with one head width of each kernel, and each head width with one or two lengths.
template <class Body>
void for_sizes(Body&& body) {
  int64_t turn = 0;
  for (const int64_t head_dim : {8, 16, 24, 40, 64, 72, 80, 88, 96, 128, 1, 7, 33, 136, 512})
    for (const int64_t seq : {1, 7, 17, 63, 64, 65, 127, 128, 129, 197, 257}) {
      ++turn;
      const bool two = seq == 17 || (seq == 65 && head_dim < 100);
      if (emulated() && !two && head_dim != 7 && head_dim != 64) continue;
      body(Sizes{1 + turn % 3, seq, 1 + turn / 3 % 3, head_dim});
    }
}

/// The part of one image in an array of the whole batch.
Array image_of(const Array& all, int64_t batch, int64_t image) {
  const int64_t n = all.size() / batch;
  Array part(all.dtype(), n);
  for (int64_t i = 0; i < n; ++i) part.set(i, all[image * n + i]);
  return part;
}

// --- forward ----------------------------------------------------------------------------------------------------------------

struct Result {
  Array out, log_sum_exp;
};

AttentionArgs arguments(const Sizes& s, DType dtype, const void* qkv, void* out, float* log_sum_exp, float scale) {
  return {.qkv = qkv, .out = out, .dtype = dtype, .batch = s.batch, .seq = s.seq, .heads = s.heads, .head_dim = s.head_dim, .scale = scale,
          .log_sum_exp = log_sum_exp};
}

Result on_gpu(const Sizes& s, const Array& qkv, float scale) {
  const DeviceArray in(qkv), out(qkv.dtype(), s.tokens() * s.width()), log_sum_exp(DType::Float32, s.tokens() * s.heads);
  gpu().attention(arguments(s, qkv.dtype(), in.data(), out.data(), log_sum_exp.as<float>(), scale));
  return {out.host(), log_sum_exp.host()};
}

Result on_cpu(const Sizes& s, const Array& qkv, float scale) {
  Result r{Array(qkv.dtype(), s.tokens() * s.width()), Array(DType::Float32, s.tokens() * s.heads)};
  cpu::kernels().attention(arguments(s, qkv.dtype(), qkv.data(), r.out.data(), r.log_sum_exp.floats(), scale));
  return r;
}

void check_case(DType dtype, const Sizes& s, float deviation = 1) {
  const std::string name = std::string(name_of(dtype)) + " " + s.text() + (deviation == 1 ? "" : ", peaked");
  const Array qkv(dtype, normal(3 * s.tokens() * s.width(), static_cast<unsigned>(s.seq * 131 + s.heads * 17 + s.head_dim), deviation));
  const Result got = on_gpu(s, qkv, s.scale()), want = on_cpu(s, qkv, s.scale());
  check_close(got.out, want.out, dtype == DType::Float32 ? 1e-4 : 2e-2, name);
  check_close(got.log_sum_exp, want.log_sum_exp, dtype == DType::Float32 ? 2e-6 : 1e-3, name + ", log_sum_exp");
}

/// Each image alone, and without log_sum_exp, gives the bits that it has in the batch.
void check_batch(DType dtype, const Sizes& s) {
  const Array qkv(dtype, normal(3 * s.tokens() * s.width(), 7));
  const Result all = on_gpu(s, qkv, s.scale());
  Sizes one = s;
  one.batch = 1;
  bool same = true;
  for (int64_t image = 0; image < s.batch; ++image) {
    const DeviceArray in(image_of(qkv, s.batch, image)), out(dtype, one.tokens() * one.width());
    gpu().attention(arguments(one, dtype, in.data(), out.data(), nullptr, s.scale()));
    same &= out.host() == image_of(all.out, s.batch, image);
  }
  check(same, std::string(name_of(dtype)) + " " + s.text() + ", images alone as in the batch");
}

/// Keys of zero weigh the same: out is the mean of v, here 3.5 and a number of the column's, and log_sum_exp the logarithm of S.
void check_mean(DType dtype, const Sizes& s) {
  Array qkv(dtype, normal(3 * s.tokens() * s.width(), 3));
  Array mean(dtype, s.tokens() * s.width());
  for (int64_t t = 0; t < s.tokens(); ++t)
    for (int64_t c = 0; c < s.width(); ++c) {
      qkv.set((3 * t + 1) * s.width() + c, 0);
      qkv.set((3 * t + 2) * s.width() + c, static_cast<double>(t % 8 + c % 16));
      mean.set(t * s.width() + c, 3.5 + static_cast<double>(c % 16));
    }
  const Result got = on_gpu(s, qkv, s.scale());
  const std::string name = std::string(name_of(dtype)) + " " + s.text() + ", keys of zero";
  check_close(got.out, mean, dtype == DType::Float32 ? 1e-6 : 0, name + " give the mean of v");
  check_close(got.log_sum_exp, Array(DType::Float32, s.tokens() * s.heads, std::log(static_cast<double>(s.seq))), 1e-6,
              name + " give the logarithm of S");
}

/// Logits of +-80 exactly: the output is the mean of v over the keys of the right sign, for any other weighs e^-160.
void check_large_logits(DType dtype, const Sizes& s) {
  Array qkv(dtype, normal(3 * s.tokens() * s.width(), 5));
  for (int64_t t = 0; t < s.tokens(); ++t)
    for (int64_t c = 0; c < 2 * s.width(); ++c) qkv.set(3 * t * s.width() + c, (c < s.width() ? t % 2 : t % 3) == 0 ? -1 : 1);
  const float scale = 80.0f / static_cast<float>(s.head_dim);
  const Result got = on_gpu(s, qkv, scale), want = on_cpu(s, qkv, scale);
  const std::string name = std::string(name_of(dtype)) + " " + s.text() + ", logits of +-80";
  check_close(got.out, want.out, dtype == DType::Float32 ? 2e-5 : 2e-2, name);
  check_close(got.log_sum_exp, want.log_sum_exp, 2e-6, name + ", log_sum_exp");
}

/// A NaN in a query shows in its row of its head, and nowhere else; one in a key in its whole head.
void check_nan(DType dtype, const Sizes& s) {
  const Array plain(dtype, normal(3 * s.tokens() * s.width(), 9));
  for (const int64_t part : {0, 1}) {
    const int64_t token = s.seq - 1, head = s.heads - 1;  // of the first image
    Array qkv = Array(dtype, plain.size());
    for (int64_t i = 0; i < plain.size(); ++i) qkv.set(i, plain[i]);
    qkv.set((3 * token + part) * s.width() + head * s.head_dim, NAN);
    const Result got = on_gpu(s, qkv, s.scale());
    bool right = true;
    for (int64_t t = 0; t < s.tokens(); ++t)
      for (int64_t c = 0; c < s.width(); ++c) {
        const bool expected = c / s.head_dim == head && (part == 0 ? t == token : t < s.seq);
        right &= std::isnan(got.out[t * s.width() + c]) == expected;
      }
    check(right, std::string(name_of(dtype)) + " " + s.text() + (part == 0 ? ", NaN in a query" : ", NaN in a key"));
  }
}

/// Rows that do not start at 16 bytes.
void check_misaligned(const Sizes& s) {
  const Array values(DType::BFloat16, normal(3 * s.tokens() * s.width(), 11));
  Array moved(DType::BFloat16, values.size() + 1);
  for (int64_t i = 0; i < values.size(); ++i) moved.set(i + 1, values[i]);
  const DeviceArray in(moved), out(DType::BFloat16, s.tokens() * s.width());
  gpu().attention(arguments(s, DType::BFloat16, in.as<bf16>() + 1, out.data(), nullptr, s.scale()));
  check_close(out.host(), on_cpu(s, values, s.scale()).out, 2e-2, "bfloat16 " + s.text() + ", misaligned");
}

void bench(DType dtype, const Sizes& s) {
  const DeviceArray qkv = DeviceArray::normal(dtype, 3 * s.tokens() * s.width()), out(dtype, s.tokens() * s.width());
  const double n = static_cast<double>(s.tokens() * s.width());
  const Work work{.flops = 4 * n * static_cast<double>(s.seq), .bytes = 4 * n * static_cast<double>(size_of(dtype))};
  time_gpu("attention " + s.text(), work, dtype,
           [&] { gpu().attention(arguments(s, dtype, qkv.data(), out.data(), nullptr, s.scale())); });
}

// --- backward ---------------------------------------------------------------------------------------------------------------

AttentionBackwardArgs arguments(const Sizes& s, DType dtype, const void* qkv, const void* out, const void* d_out, const void* log_sum_exp,
                                void* d_qkv) {
  return {.qkv = qkv, .out = out, .d_out = d_out, .log_sum_exp = static_cast<const float*>(log_sum_exp), .d_qkv = d_qkv, .dtype = dtype,
          .batch = s.batch, .seq = s.seq, .heads = s.heads, .head_dim = s.head_dim, .scale = s.scale()};
}

/// Inputs, with the CPU's forward pass.
struct Case {
  Sizes sizes;
  Array qkv, d_out, out, log_sum_exp;

  Case(DType dtype, const Sizes& s, float deviation = 1)
      : Case(s, Array(dtype, normal(3 * s.tokens() * s.width(), seed(s), deviation)),
             Array(dtype, normal(s.tokens() * s.width(), seed(s) + 1))) {}

  Case(const Sizes& s, Array input, Array gradient)
      : sizes(s), qkv(std::move(input)), d_out(std::move(gradient)), out(qkv.dtype(), d_out.size()),
        log_sum_exp(DType::Float32, s.tokens() * s.heads) {
    cpu::kernels().attention({.qkv = qkv.data(), .out = out.data(), .dtype = qkv.dtype(), .batch = s.batch, .seq = s.seq, .heads = s.heads,
                              .head_dim = s.head_dim, .scale = s.scale(), .log_sum_exp = log_sum_exp.floats()});
  }

  static unsigned seed(const Sizes& s) { return static_cast<unsigned>(s.seq * 131 + s.heads * 17 + s.head_dim); }
  std::string name() const { return std::string(name_of(qkv.dtype())) + " " + sizes.text(); }

  Array on_cpu() const {
    Array d_qkv(qkv.dtype(), qkv.size());
    cpu::kernels().attention_backward(
        arguments(sizes, qkv.dtype(), qkv.data(), out.data(), d_out.data(), log_sum_exp.data(), d_qkv.data()));
    return d_qkv;
  }

  Array on_gpu() const {
    const DeviceArray a(qkv), b(out), c(d_out), d(log_sum_exp), d_qkv(qkv.dtype(), qkv.size());
    gpu().attention_backward(arguments(sizes, qkv.dtype(), a.data(), b.data(), c.data(), d.data(), d_qkv.data()));
    return d_qkv.host();
  }

  Case image(int64_t i) const {
    Sizes one = sizes;
    one.batch = 1;
    return Case(one, image_of(qkv, sizes.batch, i), image_of(d_out, sizes.batch, i));
  }
};

/// Part q, k or v of [rows, 3 * width].
Array part_of(const Array& d_qkv, const Sizes& s, int64_t part) {
  Array out(d_qkv.dtype(), s.tokens() * s.width());
  for (int64_t i = 0; i < out.size(); ++i) out.set(i, d_qkv[(i / s.width() * 3 + part) * s.width() + i % s.width()]);
  return out;
}

void check_backward(const Case& c, const std::string& what = "") {
  const Array got = c.on_gpu(), want = c.on_cpu();
  for (int64_t part = 0; part < 3; ++part)
    check_close(part_of(got, c.sizes, part), part_of(want, c.sizes, part), c.qkv.dtype() == DType::Float32 ? 5e-5 : 2e-2,
                c.name() + what + ", d_" + "qkv"[part]);
}

void check_backward_batch(DType dtype, const Sizes& s) {
  const Case all(dtype, s);
  const Array d_qkv = all.on_gpu();
  bool same = all.on_gpu() == d_qkv;
  for (int64_t image = 0; image < s.batch; ++image) same &= all.image(image).on_gpu() == image_of(d_qkv, s.batch, image);
  check(same, all.name() + ", images alone as in the batch, and again");
}

/// float32: the gradients of a head's keys sum to zero, as far as float32 tells.
void check_key_sums(const Sizes& s) {
  const Array d_k = part_of(Case(DType::Float32, s).on_gpu(), s, 1);
  double worst = 0;
  for (int64_t image = 0; image < s.batch; ++image)
    for (int64_t c = 0; c < s.width(); ++c) {
      double sum = 0, size = 0;
      for (int64_t t = 0; t < s.seq; ++t) {
        const double v = d_k[(image * s.seq + t) * s.width() + c];
        sum += v;
        size += std::abs(v);
      }
      worst = std::max(worst, std::abs(sum) / (size + 1e-30));
    }
  check_below(worst, 1e-7, "float32 " + s.text() + ", d_k of a head sums to zero");
}

/// Logits of -196, all the same: weights are 1 / S, though 2^-log_sum_exp, that of a key of zeros, is more than float32 holds.
void check_low_logits(DType dtype, const Sizes& s) {
  const double size = 14 / std::pow(static_cast<double>(s.head_dim), 0.25);
  Array qkv(dtype, normal(3 * s.tokens() * s.width(), 13));
  for (int64_t t = 0; t < s.tokens(); ++t)
    for (int64_t c = 0; c < 2 * s.width(); ++c) qkv.set(3 * t * s.width() + c, c < s.width() ? size : -size);
  check_backward(Case(s, std::move(qkv), Array(dtype, normal(s.tokens() * s.width(), 14))), ", logits of -196");
}

/// A NaN in d_out shows in all of its head's keys, and in no other head.
void check_backward_nan(DType dtype, const Sizes& s) {
  Case c(dtype, s);
  const int64_t image = s.batch - 1, head = s.heads - 1;
  c.d_out.set((image * s.seq + s.seq / 2) * s.width() + head * s.head_dim, NAN);
  const Array d_k = part_of(c.on_gpu(), s, 1);
  bool right = true;
  for (int64_t t = 0; t < s.tokens(); ++t)
    for (int64_t h = 0; h < s.heads; ++h)
      right &= std::isnan(d_k[t * s.width() + h * s.head_dim]) == (t / s.seq == image && h == head);
  check(right, c.name() + ", NaN in d_out shows in its head alone");
}

/// Rows that do not start at 16 bytes.
void check_backward_misaligned(const Sizes& s) {
  const Case c(DType::BFloat16, s);
  Array moved(DType::BFloat16, c.qkv.size() + 1);
  for (int64_t i = 0; i < c.qkv.size(); ++i) moved.set(i + 1, c.qkv[i]);
  const DeviceArray in(moved), out(c.out), d_out(c.d_out), log_sum_exp(c.log_sum_exp), d_qkv(DType::BFloat16, c.qkv.size());
  gpu().attention_backward(
      arguments(s, DType::BFloat16, in.as<bf16>() + 1, out.data(), d_out.data(), log_sum_exp.data(), d_qkv.data()));
  check_close(d_qkv.host(), c.on_cpu(), 2e-2, c.name() + ", misaligned");
}

void bench_backward(DType dtype, const Sizes& s) {
  const int64_t n = s.tokens() * s.width();
  const DeviceArray qkv = DeviceArray::normal(dtype, 3 * n), out(dtype, n), d_out = DeviceArray::normal(dtype, n),
                    log_sum_exp(DType::Float32, s.tokens() * s.heads), d_qkv(dtype, 3 * n);
  gpu().attention({.qkv = qkv.data(), .out = out.data(), .dtype = dtype, .batch = s.batch, .seq = s.seq, .heads = s.heads,
                   .head_dim = s.head_dim, .scale = s.scale(), .log_sum_exp = log_sum_exp.as<float>()});
  const Work work{.flops = 10 * static_cast<double>(n) * static_cast<double>(s.seq), .bytes = 8 * static_cast<double>(n * size_of(dtype))};
  time_gpu("attention_backward " + s.text(), work, dtype, [&] {
    gpu().attention_backward(arguments(s, dtype, qkv.data(), out.data(), d_out.data(), log_sum_exp.data(), d_qkv.data()));
  });
}

}  // namespace

void check_attention() {
  for (const DType dtype : {DType::BFloat16, DType::Float32}) {
    for_sizes([&](const Sizes& s) { check_case(dtype, s); });
    check_case(dtype, {1, 129, 2, 64}, 8);
    check_case(dtype, {1, 65, 2, 7}, 8);
    if (dtype == DType::BFloat16 || !emulated()) check_case(dtype, {1, 1025, 1, 64});
    check_batch(dtype, {3, 65, 2, 64});
    check_batch(dtype, {3, 50, 2, 17});
    check_mean(dtype, {2, 136, 1, 64});
    check_mean(dtype, {1, 40, 3, 33});
    check_large_logits(dtype, {1, 150, 2, 16});
    check_large_logits(dtype, {1, 70, 1, 9});
    check_nan(dtype, {2, 40, 2, 8});
    check_nan(dtype, {2, 80, 2, 3});
  }
  check_misaligned({2, 33, 2, 64});
}

void bench_attention() {
  if (emulated()) return bench(DType::BFloat16, {1, 65, 1, 64});
  bench(DType::BFloat16, {32, 1025, 16, 64});
  bench(DType::BFloat16, {64, 257, 16, 64});
  bench(DType::BFloat16, {32, 729, 16, 72});
  bench(DType::BFloat16, {8, 1025, 25, 128});
  bench(DType::Float32, {8, 1025, 16, 64});
}

void check_attention_backward() {
  for (const DType dtype : {DType::BFloat16, DType::Float32}) {
    for_sizes([&](const Sizes& s) { check_backward(Case(dtype, s)); });
    check_backward(Case(dtype, {1, 129, 2, 64}, 4), ", peaked");
    check_backward(Case(dtype, {1, 65, 2, 7}, 4), ", peaked");
    if (dtype == DType::BFloat16 || !emulated()) check_backward(Case(dtype, {1, 1025, 1, 64}));
    check_backward_batch(dtype, {3, 65, 2, 64});
    check_backward_batch(dtype, {3, 50, 2, 17});
    check_low_logits(dtype, {1, 40, 2, 16});
    check_low_logits(dtype, {1, 70, 1, 9});
    check_backward_nan(dtype, {2, 40, 2, 8});
    check_backward_nan(dtype, {2, 80, 2, 3});
  }
  check_key_sums({2, 129, 2, 40});
  check_backward_misaligned({2, 33, 2, 64});
}

void bench_attention_backward() {
  if (emulated()) return bench_backward(DType::BFloat16, {1, 65, 1, 64});
  bench_backward(DType::BFloat16, {32, 1025, 16, 64});
  bench_backward(DType::BFloat16, {64, 257, 16, 64});
  bench_backward(DType::BFloat16, {32, 729, 16, 72});
  bench_backward(DType::BFloat16, {8, 1025, 25, 128});
  bench_backward(DType::Float32, {8, 1025, 16, 64});
}

}  // namespace uniflow::test
