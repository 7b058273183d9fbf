/// Linear layers of int8 weights: to the bit against plain loops, since integer sums are exact on every instruction set; independent of the
/// batch and the threads; and what an outlier token costs the others.
#include <bit>

#include "native/core/team.h"
#include "native/cpu/kernels.h"
#include "native/ops/linear.h"
#include "native/test/check.h"

namespace uniflow::test {
namespace {

struct Size {
  int64_t rows, in, out;
};

std::string shape_of(const Size& s) { return "[" + std::to_string(s.rows) + ", " + std::to_string(s.in) + "] -> " + std::to_string(s.out); }

/// A matrix quantised by plain loops, row by row.
struct Quantized {
  Quantized(const Array& plain, int64_t rows, int64_t width) : width(width), values(static_cast<size_t>(rows * width)), scales(static_cast<size_t>(rows)) {
    for (int64_t r = 0; r < rows; ++r) {
      float largest = 0;
      for (int64_t i = 0; i < width; ++i) largest = std::max(largest, std::abs(static_cast<float>(plain[r * width + i])));
      float& scale = scales[static_cast<size_t>(r)];
      int exponent;
      const float fraction = std::frexp(largest / 127, &exponent);
      scale = std::ldexp(std::ceil(std::ldexp(fraction, 16)), exponent - 16);  // 16 significant bits, rounded up
      for (int64_t i = r * width; i < (r + 1) * width; ++i)
        values[static_cast<size_t>(i)] = scale > 1e-30f ? static_cast<int32_t>(std::nearbyint(static_cast<float>(plain[i]) * (1 / scale))) : 0;
    }
  }
  const int32_t* operator[](int64_t row) const { return values.data() + row * width; }

  int64_t width;
  std::vector<int32_t> values;
  std::vector<float> scales;
};

struct Layer {
  Layer(Size s, DType dtype, DType weight_dtype = DType::Float32)
      : size(s), x(dtype, normal(s.rows * s.in, 1)), plain(weight_dtype, normal(s.out * s.in, 2, 0.1f)), bias(DType::Float32, normal(s.out, 3)) {}

  void pack() {
    packing = cpu::kernels().linear_packing(size.out, size.in, DType::Int8);
    packed = Tensor(DType::UInt8, {cpu::kernels().packed_bytes(*packing)});
    packed.buffer()->allocate();
    cpu::kernels().pack(*packing, plain.data(), plain.dtype(), packed.data());
  }

  /// Rows [first, first + count) of x alone.
  Array run(int64_t first, int64_t count) const {
    Array out(x.dtype(), count * size.out, NAN);
    cpu::kernels().linear({.x = x.bytes() + first * size.in * size_of(x.dtype()), .weight = packed.data(), .packing = packing.get(), .out = out.data(), .rows = count,
                           .in = size.in, .width = size.out, .x_dtype = x.dtype(), .out_dtype = out.dtype(), .bias = bias.floats()});
    return out;
  }
  Array run() const { return run(0, size.rows); }

  Array reference() const {
    const Quantized a(x, size.rows, size.in), w(plain, size.out, size.in);
    Array out(x.dtype(), size.rows * size.out);
    for (int64_t r = 0; r < size.rows; ++r)
      for (int64_t o = 0; o < size.out; ++o) {
        int32_t sum = 0;
        for (int64_t i = 0; i < size.in; ++i) sum += a[r][i] * w[o][i];
        const volatile float scale = w.scales[static_cast<size_t>(o)] * a.scales[static_cast<size_t>(r)], product = static_cast<float>(sum) * scale;  // no fused multiply-add
        out.set(r * size.out + o, static_cast<double>(product + bias.floats()[o]));
      }
    return out;
  }

  Size size;
  Array x, plain, bias;
  std::shared_ptr<const Packing> packing;
  Tensor packed;
};

void test_reference(Size s, DType dtype, DType weight_dtype) {
  Layer layer(s, dtype, weight_dtype);
  layer.pack();
  check(layer.run() == layer.reference(), std::string(name_of(dtype)) + " through int8 of " + name_of(weight_dtype) + ", to the bit: " + shape_of(s));
}

/// The largest sums: every product is 127 * 127, of one sign or the other.
void test_extremes(int64_t in, float sign) {
  Layer layer({3, in, 5}, DType::Float32);
  for (int64_t i = 0; i < layer.x.size(); ++i) layer.x.set(i, 1);
  for (int64_t i = 0; i < layer.plain.size(); ++i) layer.plain.set(i, double{sign});
  layer.pack();
  check(layer.run() == layer.reference(), "sums of " + std::to_string(in) + " products of the largest magnitude, " + (sign > 0 ? "positive" : "negative"));
}

void test_rows_are_independent() {
  for (const Size& s : {Size{300, 4500, 130}, {200, 48, 17}, {40, 64, 600}}) {
    Layer layer(s, DType::BFloat16);
    layer.pack();
    const Array all = layer.run();
    bool same = true;
    for (int threads : {1, 2, 3, 7}) {
      set_team_size(threads);
      for (const auto& [first, count] : {std::pair<int64_t, int64_t>{0, 1}, {3, 1}, {5, 7}, {1, 17}, {11, 29}, {0, s.rows}}) {
        const Array part = layer.run(first, count);
        same &= std::memcmp(part.data(), all.bytes() + first * s.out * 2, static_cast<size_t>(count * s.out * 2)) == 0;
      }
    }
    set_team_size(2);
    check(same, "the same bits for a row alone and among others, with 1, 2, 3 and 7 threads: " + shape_of(s));
  }
}

/// A row of NaN or infinity must not come out as numbers, and a row of zeros, or of numbers too small to divide by, comes out as the bias.
void test_special_rows() {
  Layer layer({6, 33, 9}, DType::Float32);
  const Array clean = (layer.pack(), layer.run());
  const float special[] = {std::bit_cast<float>(0xffffffffu), INFINITY, -INFINITY};
  for (int64_t r = 0; r < 3; ++r) layer.x.floats()[r * 33 + 20] = special[r];
  for (int64_t i = 3 * 33; i < 4 * 33; ++i) layer.x.set(i, 0);
  for (int64_t i = 4 * 33; i < 5 * 33; ++i) layer.x.set(i, 1e-38);
  const Array out = layer.run();
  bool lost = true, zero = true, kept = true;
  for (int64_t o = 0; o < 9; ++o) {
    for (int64_t r = 0; r < 3; ++r) lost &= !std::isfinite(out[r * 9 + o]);
    for (int64_t r = 3; r < 5; ++r) zero &= std::abs(out[r * 9 + o] - layer.bias[o]) < 1e-30;
    kept &= out[5 * 9 + o] == clean[5 * 9 + o];
  }
  check(lost, "a row with NaN or an infinity comes out as none of the numbers");
  check(zero, "rows of zeros and of tiny numbers come out as the bias");
  check(kept, "the row behind them keeps its bits");
}

/// Cosine of two rows.
double cosine(const Array& a, const std::vector<double>& b, int64_t first, int64_t n) {
  double ab = 0, aa = 0, bb = 0;
  for (int64_t i = first; i < first + n; ++i) {
    const double w = b[static_cast<size_t>(i)];
    ab += a[i] * w;
    aa += a[i] * a[i];
    bb += w * w;
  }
  return ab / std::sqrt(aa * bb);
}

/// Four outlier tokens, fifty times the others: scales per row keep every row near its float result; one scale for the tensor does not.
void test_outliers() {
  const Size s{64, 256, 128};
  Layer layer(s, DType::Float32);
  for (int64_t r : {5, 6, 30, 63})
    for (int64_t i = 0; i < s.in; ++i) layer.x.set(r * s.in + i, 50 * layer.x[r * s.in + i]);
  for (int64_t o = 0; o < s.out; ++o) layer.bias.set(o, 0);
  layer.pack();
  std::vector<double> want(static_cast<size_t>(s.rows * s.out));
  double largest = 0;
  for (int64_t i = 0; i < layer.x.size(); ++i) largest = std::max(largest, std::abs(layer.x[i]));
  Array per_tensor(DType::Float32, s.rows * s.out);
  for (int64_t r = 0; r < s.rows; ++r)
    for (int64_t o = 0; o < s.out; ++o) {
      double coarse = 0;
      for (int64_t i = 0; i < s.in; ++i) {
        want[static_cast<size_t>(r * s.out + o)] += layer.x[r * s.in + i] * layer.plain[o * s.in + i];
        coarse += std::nearbyint(layer.x[r * s.in + i] * 127 / largest) * layer.plain[o * s.in + i];
      }
      per_tensor.set(r * s.out + o, coarse);
    }
  const Array got = layer.run();
  double worst_row = 1, worst_per_tensor = 1;
  for (int64_t r = 0; r < s.rows; ++r) {
    worst_row = std::min(worst_row, cosine(got, want, r * s.out, s.out));
    worst_per_tensor = std::min(worst_per_tensor, cosine(per_tensor, want, r * s.out, s.out));
  }
  check(worst_row > 0.999, "outlier tokens spoil no row when each has its scale", "worst cosine " + text("%.5f", worst_row));
  check(worst_per_tensor < 0.99, "one scale for all rows would fail here", "worst cosine " + text("%.5f", worst_per_tensor));
}

/// Unpacked and packed again, a weight keeps its bits, so checkpoints of int8 weights do not drift.
void test_packing(int64_t out, int64_t in) {
  Layer layer({7, in, out}, DType::Float32);
  layer.pack();
  const Array before = layer.run();
  Array floats(DType::Float32, out * in);
  cpu::kernels().unpack(*layer.packing, layer.packed.data(), floats.data(), DType::Float32);
  const Quantized want(layer.plain, out, in);
  std::vector<int8_t> values(static_cast<size_t>(out * in));
  cpu::kernels().unpack(*layer.packing, layer.packed.data(), values.data(), DType::Int8);
  bool exact = true;
  for (int64_t i = 0; i < out * in; ++i) {
    exact &= values[static_cast<size_t>(i)] == want.values[static_cast<size_t>(i)];
    exact &= floats.floats()[i] == static_cast<float>(values[static_cast<size_t>(i)]) * want.scales[static_cast<size_t>(i / in)];
  }
  layer.plain = std::move(floats);
  layer.pack();
  check(exact && layer.run() == before, "packed, unpacked and packed again [" + std::to_string(out) + ", " + std::to_string(in) + "]");
}

void test_op() {
  const auto s = session();
  for (DType dtype : {DType::Float32, DType::BFloat16}) {
    Layer layer({6, 7, 5}, dtype);
    layer.pack();
    const Tensor weight = ops::pack_linear(s, to_tensor(layer.plain, {5, 7}), DType::Int8);
    const Tensor out = ops::linear(s, to_tensor(layer.x, {2, 3, 7}), weight, {.bias = to_tensor(layer.bias, {5}), .scale = {}, .residual = {}});
    check(out.shape() == Shape{2, 3, 5} && to_array(out) == layer.run(), std::string("ops::linear multiplies ") + name_of(dtype) + " with an int8 weight");
  }
  check(error_code([&] { ops::pack_linear(s, Tensor(DType::Float32, {1, 200000}), DType::Int8); }) == "UNSUPPORTED", "refuses more inputs than int32 sums can hold");
}

}  // namespace
}  // namespace uniflow::test

int main() {
  using namespace uniflow;
  using namespace uniflow::test;
  std::printf("int8, %s\n", cpu::kernels().name);
  constexpr DType f = DType::Float32, h = DType::BFloat16;
  for (const Size& s : {Size{1, 1, 1}, {1, 7, 17}, {7, 17, 1}, {17, 1, 7}, {7, 1025, 17}, {17, 7, 1025}, {1025, 17, 7}, {3, 1025, 130}, {64, 64, 64}, {13, 4099, 70}}) {
    test_reference(s, f, f);
    test_reference(s, h, h);
  }
  test_extremes(12800, 1);
  test_extremes(12800, -1);
  test_rows_are_independent();
  test_special_rows();
  test_outliers();
  for (const auto& [out, in] : {std::pair<int64_t, int64_t>{1, 1}, {7, 17}, {17, 7}, {588, 33}, {33, 1025}}) test_packing(out, in);
  test_op();
  return finish();
}
