/// Gradients of linear layers, and layers whose weight is left plain, against double precision.
#include "native/core/team.h"
#include "native/cpu/kernels.h"
#include "native/ops/linear.h"
#include "native/test/check.h"

namespace uniflow::test {
namespace {

struct Size {
  int64_t rows, in, out;
  std::string text() const { return " [" + std::to_string(rows) + ", " + std::to_string(in) + "] x [" + std::to_string(out) + ", " + std::to_string(in) + "]"; }
};

constexpr Size kSizes[] = {{1, 1, 1}, {7, 17, 5}, {17, 7, 33}, {1025, 17, 7}, {64, 64, 64}, {33, 64, 64}, {5, 588, 130}};

struct Layer {
  Layer(const Size& s, DType dtype) : size(s), x(dtype, normal(s.rows * s.in, 1)), weight(dtype, normal(s.out * s.in, 2)), d_out(dtype, normal(s.rows * s.out, 3)) {}

  std::vector<double> d_x() const {
    std::vector<double> out(static_cast<size_t>(size.rows * size.in));
    each([&](int64_t r, int64_t o, int64_t i) { out[static_cast<size_t>(r * size.in + i)] += d_out[r * size.out + o] * weight[o * size.in + i]; });
    return out;
  }
  std::vector<double> d_weight() const {
    std::vector<double> out(static_cast<size_t>(size.out * size.in));
    each([&](int64_t r, int64_t o, int64_t i) { out[static_cast<size_t>(o * size.in + i)] += d_out[r * size.out + o] * x[r * size.in + i]; });
    return out;
  }
  std::vector<double> d_bias() const {
    std::vector<double> out(static_cast<size_t>(size.out));
    for (int64_t i = 0; i < d_out.size(); ++i) out[static_cast<size_t>(i % size.out)] += d_out[i];
    return out;
  }
  std::vector<double> forward() const {
    std::vector<double> out(static_cast<size_t>(size.rows * size.out));
    each([&](int64_t r, int64_t o, int64_t i) { out[static_cast<size_t>(r * size.out + o)] += x[r * size.in + i] * weight[o * size.in + i]; });
    return out;
  }

  Size size;
  Array x, weight, d_out;

 private:
  template <class Body>
  void each(Body&& body) const {
    for (int64_t r = 0; r < size.rows; ++r)
      for (int64_t o = 0; o < size.out; ++o)
        for (int64_t i = 0; i < size.in; ++i) body(r, o, i);
  }
};

double floor_for(DType dtype, int64_t summands) { return floor_of(dtype, 8 + 8 * std::sqrt(static_cast<double>(summands))); }

void test_gradients(const Size& s, DType dtype) {
  const Layer layer(s, dtype);
  double x_error = 0, weight_error = 0, bias_error = 0;
  for (bool want_bias : {false, true})
    for (bool want_weight : {false, true})
      for (bool want_x : {false, true}) {
        const Array d_x(dtype, layer.x.size(), NAN), d_weight(DType::Float32, layer.weight.size(), NAN), d_bias(DType::Float32, s.out, NAN);
        const std::string thrown = error_code([&] { cpu::kernels().linear_backward({.x = layer.x.data(), .weight = layer.weight.data(), .d_out = layer.d_out.data(), .dtype = dtype, .rows = s.rows, .in = s.in,
                              .out = s.out, .d_x = want_x ? d_x.data() : nullptr, .d_weight = want_weight ? d_weight.floats() : nullptr,
                              .d_bias = want_bias ? d_bias.floats() : nullptr}); });
        if (thrown != "nothing") return check(false, std::string("gradients, ") + name_of(dtype) + s.text(), thrown);
        if (want_x) x_error = std::max(x_error, worst(d_x, layer.d_x()));
        if (want_weight) weight_error = std::max(weight_error, worst(d_weight, layer.d_weight()));
        if (want_bias) bias_error = std::max(bias_error, worst(d_bias, layer.d_bias()));
      }
  const std::string name = std::string(", ") + name_of(dtype) + s.text();
  check_below(x_error, floor_for(dtype, s.out), "gradient of x" + name);
  check_below(weight_error, floor_for(DType::Float32, s.rows), "gradient of the weight" + name);
  check_below(bias_error, floor_for(DType::Float32, s.rows), "gradient of the bias" + name);
}

void test_plain(const Size& s, DType dtype) {
  const Layer layer(s, dtype);
  const Array out = to_array(ops::linear(session(), to_tensor(layer.x, {s.rows, s.in}), to_tensor(layer.weight, {s.out, s.in}), {}));
  check_below(worst(out, layer.forward()), floor_for(dtype, s.in), std::string("a plain weight, ") + name_of(dtype) + s.text());
}

void test_op(DType dtype) {
  const Layer layer({6, 7, 5}, dtype);
  const Tensor x = to_tensor(layer.x, {2, 3, 7}), weight = to_tensor(layer.weight, {5, 7}), d_out = to_tensor(layer.d_out, {2, 3, 5});
  const std::string name = std::string(", ") + name_of(dtype);
  const auto g = ops::linear_backward(session(), x, weight, d_out, true, true, true);
  check(g.x.shape() == x.shape() && g.weight.shape() == weight.shape() && g.bias.shape() == Shape{5}, "gradients have the shapes of what they are of" + name);
  check_below(std::max({worst(to_array(g.x), layer.d_x()), worst(to_array(g.weight), layer.d_weight()), worst(to_array(g.bias), layer.d_bias())}), floor_of(dtype, 60),
              "ops::linear_backward" + name);
  const auto none = ops::linear_backward(session(), x, weight, d_out, true, false, false);
  check(none.x && !none.weight && !none.bias, "gradients not asked for are not computed" + name);
  const auto empty = ops::linear_backward(session(), Tensor(dtype, {0, 7}), weight, Tensor(dtype, {0, 5}), true, true, true);
  check(worst(to_array(empty.weight), std::vector<double>(35, 0.0)) == 0 && worst(to_array(empty.bias), std::vector<double>(5, 0.0)) == 0 && to_array(empty.x).size() == 0,
        "no rows: gradients of zero" + name);
}

struct Gradients {
  Array x, weight, bias;
  bool operator==(const Gradients&) const = default;
};

/// d_x of a row is a function of that row; sums over the rows do not depend on the threads.
void test_bits(DType dtype) {
  const Size s{600, 70, 130};
  const Layer layer(s, dtype);
  const auto gradients = [&](int64_t first, int64_t rows) {
    Gradients g{Array(dtype, rows * s.in), Array(DType::Float32, s.out * s.in), Array(DType::Float32, s.out)};
    cpu::kernels().linear_backward({.x = layer.x.bytes() + first * s.in * size_of(dtype), .weight = layer.weight.data(), .d_out = layer.d_out.bytes() + first * s.out * size_of(dtype), .dtype = dtype,
                                    .rows = rows, .in = s.in, .out = s.out, .d_x = g.x.data(), .d_weight = g.weight.floats(), .d_bias = g.bias.floats()});
    return g;
  };
  const Gradients all = gradients(0, s.rows);
  bool same = true, alone = true;
  for (int threads : {1, 2, 3, 7}) {
    set_team_size(threads);
    same &= gradients(0, s.rows) == all;
    for (int64_t rows : {1, 7, 17}) {
      const Gradients part = gradients(5, rows);
      alone &= std::memcmp(part.x.data(), all.x.bytes() + 5 * s.in * size_of(dtype), static_cast<size_t>(rows * s.in * size_of(dtype))) == 0;
    }
  }
  set_team_size(2);
  check(same, std::string("the same gradients with 1, 2, 3 and 7 threads, ") + name_of(dtype));
  check(alone, std::string("the same gradient of a row alone and among others, ") + name_of(dtype));
}

void test_refusals() {
  const auto s = idle_session();
  const Tensor x(DType::Float32, {3, 7}), weight(DType::Float32, {5, 7}), d(DType::Float32, {3, 5});
  auto refused = [&](const char* name, const Tensor& x, const Tensor& w, const Tensor& d) { check_refused(name, [&] { ops::linear_backward(s, x, w, d, true, true, true); }); };
  refused("a packed weight", x, ops::pack_linear(s, weight, DType::Float32), d);
  refused("a weight of another type", x, Tensor(DType::BFloat16, {5, 7}), d);
  refused("a gradient of another shape", x, weight, Tensor(DType::Float32, {3, 7}));
  refused("a gradient of another type", x, weight, Tensor(DType::BFloat16, {3, 5}));
  refused("no gradient", x, weight, {});
  refused("a weight without inputs", Tensor(DType::Float32, {3, 0}), Tensor(DType::Float32, {5, 0}), d);
}

}  // namespace
}  // namespace uniflow::test

int main() {
  using namespace uniflow;
  using namespace uniflow::test;
  std::printf("linear backward, %s\n", cpu::kernels().name);
  for (DType dtype : {DType::Float32, DType::BFloat16}) {
    for (const Size& s : kSizes) {
      test_gradients(s, dtype);
      test_plain(s, dtype);
    }
    test_op(dtype);
    test_bits(dtype);
  }
  test_refusals();
  return finish();
}
