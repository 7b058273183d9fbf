/// Linear layers against double precision: out = residual + scale * act(x W^T + bias), and how weights are packed.
#include "native/core/team.h"
#include "native/cpu/kernels.h"
#include "native/ops/linear.h"
#include "native/test/check.h"

namespace uniflow::test {
namespace {

struct Size {
  int64_t rows, in, out;
};

double activate(Activation a, double x) {
  switch (a) {
    case Activation::None: return x;
    case Activation::Gelu: return x / 2 * std::erfc(-x / std::sqrt(2));
    case Activation::GeluTanh: return x / 2 * (1 + std::tanh(std::sqrt(2 / 3.14159265358979324) * (x + 0.044715 * x * x * x)));
    case Activation::QuickGelu: return x / (1 + std::exp(-1.702 * x));
    case Activation::Silu: return x / (1 + std::exp(-x));
  }
  return 0;
}

constexpr Activation kActivations[] = {Activation::None, Activation::Gelu, Activation::GeluTanh, Activation::QuickGelu, Activation::Silu};

/// A layer with random values; products are kept, as every combination of options starts from them.
struct Layer {
  Layer(Size s, DType x_dtype, DType out_dtype, DType weight_dtype)
      : size(s),
        x(x_dtype, normal(s.rows * s.in, 1)),
        plain(weight_dtype, normal(s.out * s.in, 2, 1 / std::sqrt(static_cast<float>(s.in)))),
        bias(DType::Float32, normal(s.out, 3)),
        scale(DType::Float32, normal(s.out, 4)),
        residual(out_dtype, normal(s.rows * s.out, 5)),
        packing(cpu::kernels().linear_packing(s.out, s.in, weight_dtype)),
        packed(DType::UInt8, {cpu::kernels().packed_bytes(*packing)}),
        products(static_cast<size_t>(s.rows * s.out)) {
    packed.buffer()->allocate();
    cpu::kernels().pack(*packing, plain.data(), weight_dtype, packed.data());
    for (int64_t r = 0; r < s.rows; ++r)
      for (int64_t o = 0; o < s.out; ++o)
        for (int64_t i = 0; i < s.in; ++i) products[static_cast<size_t>(r * s.out + o)] += x[r * s.in + i] * plain[o * s.in + i];
  }

  Array run(Activation activation, bool with_bias, bool with_scale, bool with_residual) const {
    Array out(residual.dtype(), size.rows * size.out, NAN);
    cpu::kernels().linear({.x = x.data(), .weight = packed.data(), .packing = packing.get(), .out = out.data(), .rows = size.rows, .in = size.in, .width = size.out, .x_dtype = x.dtype(),
                 .out_dtype = out.dtype(), .bias = with_bias ? bias.floats() : nullptr, .scale = with_scale ? scale.floats() : nullptr,
                 .residual = with_residual ? residual.data() : nullptr, .activation = activation});
    return out;
  }

  std::vector<double> reference(Activation activation, bool with_bias, bool with_scale, bool with_residual) const {
    std::vector<double> want;
    for (int64_t i = 0; i < size.rows * size.out; ++i) {
      double v = activate(activation, products[static_cast<size_t>(i)] + (with_bias ? bias[i % size.out] : 0));
      if (with_scale) v *= scale[i % size.out];
      want.push_back(v + (with_residual ? residual[i] : 0));
    }
    return want;
  }

  Size size;
  Array x, plain, bias, scale, residual;
  std::shared_ptr<const Packing> packing;
  Tensor packed;
  std::vector<double> products;
};

void test_options(Size s, DType x, DType out, DType weight) {
  const Layer layer(s, x, out, weight);
  double error = 0;
  for (Activation a : kActivations)
    for (bool bias : {false, true})
      for (bool scale : {false, true})
        for (bool residual : {false, true})
          error = std::max(error, worst(layer.run(a, bias, scale, residual), layer.reference(a, bias, scale, residual)));
  check_below(error, floor_of(out, 80), std::string(name_of(x)) + " x " + name_of(weight) + " to " + name_of(out) + " [" + std::to_string(s.rows) + ", " + std::to_string(s.in) + "] x [" +
                                            std::to_string(s.out) + ", " + std::to_string(s.in) + "], every combination of options");
}

void test_long(Size s, DType dtype) {
  const Layer layer(s, dtype, dtype, dtype);
  check_below(worst(layer.run(Activation::None, true, true, true), layer.reference(Activation::None, true, true, true)), floor_of(dtype, 200),
              std::string(name_of(dtype)) + " with an inner dimension of " + std::to_string(s.in) + ", " + std::to_string(s.rows) + " rows");
}

void test_packing(int64_t out, int64_t in) {
  const std::string name = " [" + std::to_string(out) + ", " + std::to_string(in) + "]";
  const auto s = session();
  const Array plain(DType::Float32, normal(out * in, 6));
  const Array half(DType::BFloat16, normal(out * in, 6));
  const Shape shape{out, in};
  check(to_array(ops::unpack_linear(s, ops::pack_linear(s, to_tensor(plain, shape), DType::Float32))) == plain, "float32 packed and unpacked" + name);
  bool same = true, rounded = true;
  const Array back = to_array(ops::unpack_linear(s, ops::pack_linear(s, to_tensor(half, shape), DType::BFloat16)));
  const Array widened = to_array(ops::unpack_linear(s, ops::pack_linear(s, to_tensor(half, shape), DType::Float32)));
  const Array narrowed = to_array(ops::unpack_linear(s, ops::pack_linear(s, to_tensor(plain, shape), DType::BFloat16)));
  for (int64_t i = 0; i < plain.size(); ++i) {
    same &= back[i] == half[i] && widened[i] == half[i];
    rounded &= narrowed[i] == half[i];
  }
  check(same, "bfloat16 packed and unpacked" + name);
  check(rounded, "float32 packed as bfloat16, rounded" + name);
}

/// Rows [first, first + count) of x alone, as the layer computes them.
Array run_rows(const Layer& layer, int64_t first, int64_t count, Activation activation) {
  const int64_t in = layer.size.in, out = layer.size.out;
  Array result(layer.residual.dtype(), count * out, NAN);
  const auto row = [first](const Array& a, int64_t width) { return a.bytes() + first * width * size_of(a.dtype()); };
  cpu::kernels().linear({.x = row(layer.x, in), .weight = layer.packed.data(), .packing = layer.packing.get(), .out = result.data(), .rows = count, .in = in, .width = out,
                         .x_dtype = layer.x.dtype(), .out_dtype = result.dtype(), .bias = layer.bias.floats(), .scale = layer.scale.floats(),
                         .residual = row(layer.residual, out), .activation = activation});
  return result;
}

/// A row's result is a function of that row and the weights: not of the rows beside it, nor of the threads.
void test_rows_are_independent(DType dtype) {
  for (const Size& s : {Size{300, 1100, 130}, {200, 48, 17}, {40, 64, 600}}) {
    const Layer layer(s, dtype, dtype, dtype);
    const Array all = layer.run(Activation::Gelu, true, true, true);
    bool same = true;
    for (int threads : {1, 2, 3, 7}) {
      set_team_size(threads);
      for (const auto& [first, count] : {std::pair<int64_t, int64_t>{0, 1}, {3, 1}, {5, 7}, {1, 17}, {11, 29}, {0, s.rows}}) {
        const Array part = run_rows(layer, first, count, Activation::Gelu);
        same &= std::memcmp(part.data(), all.bytes() + first * s.out * size_of(dtype), static_cast<size_t>(count * s.out * size_of(dtype))) == 0;
      }
    }
    set_team_size(2);
    check(same, std::string("the same bits for a row alone and among others, with 1, 2, 3 and 7 threads, ") + name_of(dtype) + " " + std::to_string(s.in) + " -> " + std::to_string(s.out));
  }
}

void test_op() {
  const auto s = session();
  for (DType dtype : {DType::Float32, DType::BFloat16}) {
    const Layer layer({6, 7, 5}, dtype, dtype, dtype);
    const Tensor weight = ops::pack_linear(s, to_tensor(layer.plain, {5, 7}), dtype), x = to_tensor(layer.x, {2, 3, 7});
    const Tensor out = ops::linear(s, x, weight, {to_tensor(layer.bias, {5}), to_tensor(layer.scale, {5}), to_tensor(layer.residual, {2, 3, 5}), Activation::Silu});
    check(out.shape() == Shape{2, 3, 5} && to_array(out) == layer.run(Activation::Silu, true, true, true), std::string("ops::linear is the layer, ") + name_of(dtype));
    const Tensor none = ops::linear(s, Tensor(dtype, {2, 0, 7}), weight, {});
    check(!wait(none) && none.shape() == Shape{2, 0, 5}, std::string("ops::linear of no rows, ") + name_of(dtype));
  }
  const Layer mixed({6, 7, 5}, DType::BFloat16, DType::BFloat16, DType::Float32);
  const Tensor weight = ops::pack_linear(s, to_tensor(mixed.plain, {5, 7}), DType::Float32);
  check(to_array(ops::linear(s, to_tensor(mixed.x, {6, 7}), weight, {})) == mixed.run(Activation::None, false, false, false), "bfloat16 activations through a float32 weight");
}

void test_refusals() {
  const auto s = idle_session();
  const Tensor plain(DType::Float32, {5, 7}), x(DType::Float32, {3, 7}), weight = ops::pack_linear(s, plain, DType::Float32);
  check_refused("a plain weight of another type", [&] { ops::linear(s, x, Tensor(DType::BFloat16, {5, 7}), {}); });
  check_refused("a weight that is a vector", [&] { ops::linear(s, x, Tensor(DType::Float32, {7}), {}); });
  check_refused("unpacking a plain weight", [&] { ops::unpack_linear(s, plain); });
  check_refused("activations of another width", [&] { ops::linear(s, Tensor(DType::Float32, {3, 6}), weight, {}); });
  check_refused("activations that are bytes", [&] { ops::linear(s, Tensor(DType::UInt8, {3, 7}), weight, {}); });
  check_refused("packed activations", [&] { ops::linear(s, ops::pack_linear(s, Tensor(DType::Float32, {7, 7}), DType::Float32), weight, {}); });
  check_refused("a scalar", [&] { ops::linear(s, Tensor(DType::Float32, {}), weight, {}); });
  check_refused("a bias of another width", [&] { ops::linear(s, x, weight, {.bias = Tensor(DType::Float32, {7}), .scale = {}, .residual = {}}); });
  check_refused("a residual of another shape", [&] { ops::linear(s, x, weight, {.bias = {}, .scale = {}, .residual = Tensor(DType::Float32, {5, 3})}); });
  check_refused("a residual of another type", [&] { ops::linear(s, x, weight, {.bias = {}, .scale = {}, .residual = Tensor(DType::BFloat16, {3, 5})}); });
  check_refused("packing a vector", [&] { ops::pack_linear(s, Tensor(DType::Float32, {5}), DType::Float32); });
  check_refused("packing bytes", [&] { ops::pack_linear(s, Tensor(DType::UInt8, {5, 7}), DType::Float32); });
  check_refused("packing a packed weight", [&] { ops::pack_linear(s, weight, DType::Float32); });
  check_refused("packing for products of bytes", [&] { ops::pack_linear(s, plain, DType::UInt8); });
  check_refused("packing a weight without inputs", [&] { ops::pack_linear(s, Tensor(DType::Float32, {5, 0}), DType::Float32); });
  check_refused("packing a weight without outputs", [&] { ops::pack_linear(s, Tensor(DType::Float32, {0, 7}), DType::Float32); });
  const Tensor half = ops::pack_linear(s, plain, DType::BFloat16);
  check_refused("float32 activations for a bfloat16 weight", [&] { ops::linear(s, x, half, {}); });
}

}  // namespace
}  // namespace uniflow::test

int main() {
  using namespace uniflow;
  using namespace uniflow::test;
  std::printf("linear, %s\n", cpu::kernels().name);
  constexpr DType f = DType::Float32, h = DType::BFloat16;
  for (const Size& s : {Size{1, 1, 1}, {7, 17, 1}, {17, 7, 588}, {5, 588, 1025}, {1025, 17, 7}, {3, 1025, 17}, {64, 64, 64}}) {
    test_options(s, f, f, f);
    test_options(s, h, h, h);
    test_options(s, h, f, h);  // the flow keeps its residual in float32
  }
  test_options({17, 48, 33}, h, h, f);
  test_options({17, 48, 33}, f, h, f);
  for (const Size& s : {Size{64, 8192, 48}, {2, 12800, 64}, {300, 4096, 40}, {520, 1536, 130}})
    for (DType dtype : {f, h}) test_long(s, dtype);
  for (const auto& [out, in] : {std::pair<int64_t, int64_t>{1, 1}, {7, 17}, {17, 7}, {588, 33}, {33, 1025}, {64, 64}}) test_packing(out, in);
  test_rows_are_independent(f);
  test_rows_are_independent(h);
  test_op();
  test_refusals();
  return finish();
}
