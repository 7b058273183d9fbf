/// LayerNorm and RMSNorm of the instruction set in use (environment variable UNIFLOW_ISA) against double precision: all
/// that NormArgs can ask for, and the checks of ops::norm.
#include "native/ops/norm.h"

#include "native/core/team.h"
#include "native/cpu/kernels.h"
#include "native/test/check.h"

namespace uniflow::test {
namespace {

constexpr int64_t kWidths[] = {1, 7, 17, 48, 588, 1024, 1025};
constexpr float kEps = 1e-6f;
constexpr double kUntouched = 77;

enum class Residual { None, Plain, Gated };

struct Case {
  DType x, out;
  bool rms;
  int64_t rows, width;
  bool weight, bias, modulated;
  Residual residual;
};

/// One row as the contract of NormArgs has it; h: the row after the gated residual.
std::vector<double> reference(const Case& c, const std::vector<double>& h, const Array& weight, const Array& bias, const Array& modulation,
                              int64_t modulation_row) {
  const auto n = static_cast<double>(c.width);
  double mean = 0, squares = 0;
  if (!c.rms) {
    for (double v : h) mean += v / n;
  }
  for (double v : h) squares += (v - mean) * (v - mean) / n;
  std::vector<double> out;
  for (int64_t i = 0; i < c.width; ++i) {
    double v = (h[static_cast<size_t>(i)] - mean) / std::sqrt(squares + double{kEps});
    if (c.weight) v *= weight[i];
    if (c.bias) v += bias[i];
    if (c.modulated) v = v * (1 + modulation[modulation_row + c.width + i]) + modulation[modulation_row + i];
    out.push_back(v);
  }
  return out;
}

/// Runs one case, rows apart by more than their width, and returns the worst error of all that it wrote.
double error_of(const Case& c) {
  const int64_t x_stride = c.width + 5, out_stride = c.width + 3, modulation_stride = 3 * c.width;
  const auto seed = static_cast<unsigned>(c.width * 7 + c.rows);
  const Array x(c.x, normal((c.rows - 1) * x_stride + c.width, seed, 2, 0.5f));
  const Array residual(DType::Float32, normal(c.rows * c.width, seed + 1, 2));
  const Array branch(c.out, normal(c.rows * c.width, seed + 2)), modulation(c.out, normal(c.rows * modulation_stride, seed + 3, 0.5f));
  const Array weight(DType::Float32, normal(c.width, seed + 4, 0.3f, 1)), bias(DType::Float32, normal(c.width, seed + 5));
  const Array out(c.out, (c.rows - 1) * out_stride + c.width, kUntouched);

  std::vector<double> want(static_cast<size_t>(out.size()), kUntouched), want_h;
  for (int64_t r = 0; r < c.rows; ++r) {
    std::vector<double> h;
    for (int64_t i = 0; i < c.width; ++i) {
      if (c.residual == Residual::None) h.push_back(x[r * x_stride + i]);
      else h.push_back(residual[r * c.width + i]);
      if (c.residual == Residual::Gated) h.back() += modulation[r * modulation_stride + 2 * c.width + i] * branch[r * c.width + i];
    }
    const auto row = reference(c, h, weight, bias, modulation, r * modulation_stride);
    std::copy(row.begin(), row.end(), want.begin() + r * out_stride);
    want_h.insert(want_h.end(), h.begin(), h.end());
  }

  const int64_t element = size_of(c.out);
  auto column = [&](int64_t i) { return static_cast<std::byte*>(modulation.data()) + i * c.width * element; };
  NormArgs a{.x = x.data(), .out = out.data(), .x_dtype = c.x, .out_dtype = c.out, .rows = c.rows, .width = c.width,
                  .x_stride = x_stride, .out_stride = out_stride, .rms = c.rms, .eps = kEps,
                  .weight = c.weight ? weight.floats() : nullptr, .bias = c.bias ? bias.floats() : nullptr};
  if (c.modulated) a.shift = column(0), a.scale = column(1), a.modulation_stride = modulation_stride;
  if (c.residual != Residual::None) a.x = nullptr, a.residual = residual.floats();
  if (c.residual == Residual::Gated) a.branch = branch.data(), a.gate = column(2), a.gate_stride = modulation_stride;
  cpu::kernels().norm(a);
  const double h_error = c.residual == Residual::None ? 0 : worst(residual, want_h);
  return std::max(worst(out, want), h_error <= 4 * 0x1p-24 ? 0 : h_error);
}

void test_options(DType x, DType out, bool rms, int64_t width) {
  double error = 0;
  for (int64_t rows : {1, 19})
    for (bool weight : {false, true})
      for (bool bias : {false, true})
        for (bool modulated : {false, true})
          for (Residual residual : {Residual::None, Residual::Plain, Residual::Gated})
            error = std::max(error, error_of({x, out, rms, rows, width, weight, bias, modulated, residual}));
  check_below(error, floor_of(out, 60), std::string(rms ? "RMSNorm " : "LayerNorm ") + name_of(x) + " to " + name_of(out) + ", width " +
                                            std::to_string(width) + ", every combination of options");
}

/// Norm of `x`, rows of `width`, without any option.
Array plain(const Array& x, int64_t width, bool rms) {
  Array out(x.dtype(), x.size());
  cpu::kernels().norm({.x = x.data(), .out = out.data(), .x_dtype = x.dtype(), .out_dtype = x.dtype(), .rows = x.size() / width, .width = width,
                       .x_stride = width, .out_stride = width, .rms = rms, .eps = kEps, .weight = nullptr, .bias = nullptr});
  return out;
}

/// Mean 1e4, deviation 1: what is left of float32 is a unit of 1e-3, and the result must be as good as that.
void test_offset(int64_t width) {
  const Array x(DType::Float32, normal(5 * width, 3, 1, 1e4f)), none(DType::Float32, 0);
  std::vector<double> want;
  for (int64_t r = 0; r < 5; ++r) {
    std::vector<double> h;
    for (int64_t i = 0; i < width; ++i) h.push_back(x[r * width + i]);
    const auto row = reference({DType::Float32, DType::Float32, false, 5, width, false, false, false, Residual::None}, h, none, none, none, 0);
    want.insert(want.end(), row.begin(), row.end());
  }
  check_below(worst(plain(x, width, false), want), 1e-3, "mean 1e4, deviation 1, width " + std::to_string(width));
}

void test_constant(int64_t width, float value) {
  const Array x(DType::Float32, width, value);
  const double rms = double{value} / std::sqrt(double{value} * value + double{kEps});
  const std::string name = "a row of " + std::to_string(width) + " times " + text("%g", value);
  check_below(worst(plain(x, width, false), std::vector<double>(static_cast<size_t>(width), 0.0)), 1e-3, name + " gives zeros");
  check_below(worst(plain(x, width, true), std::vector<double>(static_cast<size_t>(width), rms)), 1e-6, name + " gives ones under RMSNorm");
}

void test_in_place(DType dtype) {
  const Array x(dtype, normal(40 * 33, 9)), out = plain(x, 33, false);
  cpu::kernels().norm({.x = x.data(), .out = x.data(), .x_dtype = dtype, .out_dtype = dtype, .rows = 40, .width = 33, .x_stride = 33,
                       .out_stride = 33, .rms = false, .eps = kEps, .weight = nullptr, .bias = nullptr});
  check(x == out, std::string("in place, ") + name_of(dtype));
}

void test_rows() {
  Array x(DType::Float32, normal(40 * 17, 4));
  const Array clean = plain(x, 17, false);
  set_team_size(3);
  check(plain(x, 17, false) == clean, "the same bits with three threads");
  set_team_size(2);
  x.set(20 * 17 + 3, NAN);
  const Array out = plain(x, 17, false);
  bool ok = true;
  for (int64_t i = 0; i < out.size(); ++i) ok &= i / 17 == 20 ? std::isnan(out[i]) : out[i] == clean[i];
  check(ok, "a NaN spoils its own row and no other");
  check(plain(Array(DType::Float32, 0), 17, false).size() == 0, "no rows at all");
}

void test_op() {
  const Array x(DType::Float32, normal(2 * 3 * 7, 5)), w(DType::Float32, normal(7, 6));
  const Tensor t = to_tensor(x, {2, 3, 7}), weight = to_tensor(w, {7});
  check(to_array(ops::norm(session(), t, {})) == plain(x, 7, false), "ops::norm is the kernel");
  const Tensor empty = ops::norm(session(), Tensor(DType::Float32, {0, 7}), {});
  check(!wait(empty) && empty.shape() == Shape{0, 7}, "ops::norm of no rows");

  const auto s = idle_session();
  using Options = ops::NormOptions;
  auto refused = [&](const char* name, const Tensor& in, Options o) { check_refused(name, [&] { ops::norm(s, in, o); }); };
  refused("no tensor", {}, {});
  refused("a scalar", Tensor(DType::Float32, {}), {});
  refused("pixels", Tensor(DType::UInt8, {2, 7}), {});
  refused("a weight of another width", t, {.weight = Tensor(DType::Float32, {6}), .bias = {}, .scale = {}, .shift = {}});
  refused("a bfloat16 weight", t, {.weight = Tensor(DType::BFloat16, {7}), .bias = {}, .scale = {}, .shift = {}});
  refused("a scale without a shift", t, {.weight = {}, .bias = {}, .scale = t, .shift = {}});
  refused("a scale of another type", t, {.weight = {}, .bias = {}, .scale = Tensor(DType::BFloat16, {2, 3, 7}), .shift = t});
  refused("a packed weight for x", ops::pack_linear(s, Tensor(DType::Float32, {7, 7}), DType::Float32), {});
}

}  // namespace
}  // namespace uniflow::test

int main() {
  using namespace uniflow;
  using namespace uniflow::test;
  std::printf("norm, instruction set %s\n", cpu::kernels().name);
  for (bool rms : {false, true})
    for (DType x : {DType::Float32, DType::BFloat16})
      for (DType out : {DType::Float32, DType::BFloat16})
        for (int64_t width : kWidths) test_options(x, out, rms, width);
  for (int64_t width : {7, 17, 48, 588, 1024, 1025, 3200}) test_offset(width);
  for (int64_t width : {1, 17, 588, 1025})
    for (float value : {0.0f, 3.0f, -0.1f, 10.1f, 12345.678f}) test_constant(width, value);
  test_in_place(DType::Float32);
  test_in_place(DType::BFloat16);
  test_rows();
  test_op();
  return finish();
}
