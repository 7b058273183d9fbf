/// Activations, joins of residuals and column sums on the GPU against the CPU's.
#include "native/test/gpu/gpu.h"

namespace uniflow::test {
namespace {

constexpr DType kTypes[] = {DType::BFloat16, DType::Float32};
constexpr double kUntouched = 77;

double tolerance_of(DType dtype) { return dtype == DType::BFloat16 ? 2e-2 : 2e-4; }

std::string text_of(DType dtype) { return dtype == DType::BFloat16 ? " bfloat16" : " float32"; }
std::string text_of(DType dtype, int64_t rows, int64_t width) {
  return text_of(dtype) + " [" + std::to_string(rows) + ", " + std::to_string(width) + "]";
}

const float* floats_of(const DeviceArray* a) { return a ? a->as<float>() : nullptr; }
const float* floats_of(const Array* a) { return a ? a->floats() : nullptr; }
template <class A>
void* data_of(const A* a) {
  return a ? a->data() : nullptr;
}

// --- activations -------------------------------------------------------------------------------------------------------

constexpr std::pair<Activation, const char*> kActivations[] = {{Activation::None, "none"},
                                                              {Activation::Gelu, "gelu"},
                                                              {Activation::GeluTanh, "gelu_tanh"},
                                                              {Activation::QuickGelu, "quick_gelu"},
                                                              {Activation::Silu, "silu"}};

void check_activation(Activation kind, const std::string& name, DType dtype, int64_t n) {
  std::vector<float> values = normal(n, 3, 3);
  const float ends[] = {0, -0.0f, 30, -30, 200, -200};  // where exponentials overflow
  std::copy_n(ends, std::min<int64_t>(n, 6), values.begin());
  const Array x(dtype, values), d_out(dtype, normal(n, 4)), out(dtype, n), d_x(dtype, n);
  const DeviceArray gpu_x(x), gpu_d(d_out), gpu_out(dtype, n), gpu_d_x(dtype, n);
  cpu::kernels().activation(kind, x.data(), out.data(), dtype, n);
  gpu().activation(kind, gpu_x.data(), gpu_out.data(), dtype, n);
  cpu::kernels().activation_backward(kind, x.data(), d_out.data(), d_x.data(), dtype, n);
  gpu().activation_backward(kind, gpu_x.data(), gpu_d.data(), gpu_d_x.data(), dtype, n);
  const std::string title = name + text_of(dtype) + " [" + std::to_string(n) + "]";
  check_close(gpu_out.host(), out, dtype == DType::BFloat16 ? 4e-3 : 1e-6, "activation " + title);
  check_close(gpu_d_x.host(), d_x, dtype == DType::BFloat16 ? 4e-3 : 1e-5, "activation_backward " + title);
}

/// Far out, where squares overflow.
void check_far_derivatives() {
  const Array x(DType::Float32, {2e19f, -2e19f, 3e38f, -3e38f}), one(DType::Float32, 4, 1.0), want(DType::Float32, {1, 0, 1, 0});
  const DeviceArray gpu_x(x), gpu_d(one), d_x(DType::Float32, 4);
  for (const auto& [kind, name] : kActivations) {
    if (kind == Activation::None) continue;
    gpu().activation_backward(kind, gpu_x.data(), gpu_d.data(), d_x.data(), DType::Float32, 4);
    check_close(d_x.host(), want, 0, std::string("activation_backward ") + name + " of numbers whose squares overflow");
  }
}

/// In place, from the second element on: not an address for vectors.
void check_activation_in_place() {
  for (const DType dtype : kTypes) {
    const Array x(dtype, normal(101, 5));
    const DeviceArray on_gpu(x);
    auto from_second = [&](void* p) { return static_cast<std::byte*>(p) + size_of(dtype); };
    cpu::kernels().activation(Activation::Silu, from_second(x.data()), from_second(x.data()), dtype, 100);
    gpu().activation(Activation::Silu, from_second(on_gpu.data()), from_second(on_gpu.data()), dtype, 100);
    check_close(on_gpu.host(), x, tolerance_of(dtype), "activation silu" + text_of(dtype) + " in place, from the second element on");
  }
}

void check_swiglu_backward(DType dtype, int64_t rows, int64_t n) {
  const Array x(dtype, normal(2 * rows * n, 6)), d_out(dtype, normal(rows * n, 7)), d_x(dtype, 2 * rows * n);
  const DeviceArray gpu_x(x), gpu_d(d_out), gpu_d_x(dtype, 2 * rows * n);
  cpu::kernels().swiglu_backward(x.data(), d_out.data(), d_x.data(), dtype, rows, n);
  gpu().swiglu_backward(gpu_x.data(), gpu_d.data(), gpu_d_x.data(), dtype, rows, n);
  check_close(gpu_d_x.host(), d_x, tolerance_of(dtype), "swiglu_backward" + text_of(dtype, rows, n));
}

// --- residuals ---------------------------------------------------------------------------------------------------------

void check_scale_add(DType dtype, int64_t rows, int64_t width, bool scaled, bool gated) {
  const int64_t n = rows * width;
  const Array residual(dtype, normal(n, 8)), branch(dtype, normal(n, 9)), gate(dtype, normal(n, 10)), out(dtype, n);
  const Array scale(DType::Float32, normal(width, 11));
  const DeviceArray gpu_residual(residual), gpu_branch(branch), gpu_gate(gate), gpu_scale(scale), gpu_out(dtype, n);
  auto run = [&](const Kernels& kernels, const auto& h, const auto& b, const auto& g, const auto& s, const auto& to) {
    kernels.scale_add({.residual = h.data(), .branch = b.data(), .out = to.data(), .dtype = dtype, .rows = rows, .width = width,
                       .scale = floats_of(scaled ? &s : nullptr), .gate = data_of(gated ? &g : nullptr)});
  };
  run(cpu::kernels(), residual, branch, gate, scale, out);
  run(gpu(), gpu_residual, gpu_branch, gpu_gate, gpu_scale, gpu_out);
  const std::string title = "scale_add" + text_of(dtype, rows, width) + (scaled ? ", scale" : "") + (gated ? ", gate" : "");
  check_close(gpu_out.host(), out, tolerance_of(dtype), title);
  run(gpu(), gpu_residual, gpu_branch, gpu_gate, gpu_scale, gpu_residual);
  check_close(gpu_residual.host(), out, tolerance_of(dtype), title + ", in place");
}

/// The outputs of scale_add_backward.
template <class A>
struct ScaleAddGradients {
  A branch, scale, gate;
};

void check_scale_add_backward(DType dtype, int64_t rows, int64_t width, bool scaled, bool gated, bool summed) {
  const int64_t n = rows * width;
  const Array d_out(dtype, normal(n, 12)), branch(dtype, normal(n, 13)), gate(dtype, normal(n, 14));
  const Array scale(DType::Float32, normal(width, 15));
  const DeviceArray gpu_d(d_out), gpu_branch(branch), gpu_gate(gate), gpu_scale(scale);
  const ScaleAddGradients<Array> want{Array(dtype, n), Array(DType::Float32, width, kUntouched), Array(dtype, n, kUntouched)};
  const ScaleAddGradients<DeviceArray> got{DeviceArray(dtype, n), DeviceArray(want.scale), DeviceArray(want.gate)};
  auto run = [&](const Kernels& kernels, const auto& d, const auto& b, const auto& g, const auto& s, const auto& to) {
    kernels.scale_add_backward({.d_out = d.data(), .branch = b.data(), .d_branch = to.branch.data(), .dtype = dtype, .rows = rows,
                                .width = width, .scale = floats_of(scaled ? &s : nullptr), .gate = data_of(gated ? &g : nullptr),
                                .d_scale = summed ? static_cast<float*>(to.scale.data()) : nullptr,
                                .d_gate = data_of(gated ? &to.gate : nullptr)});
  };
  run(cpu::kernels(), d_out, branch, gate, scale, want);
  run(gpu(), gpu_d, gpu_branch, gpu_gate, gpu_scale, got);
  const std::string title = "scale_add_backward" + text_of(dtype, rows, width) + (scaled ? ", scale" : "") + (gated ? ", gate" : "");
  check_close(got.branch.host(), want.branch, tolerance_of(dtype), title);
  check_close(got.scale.host(), want.scale, 2e-4, title + ": d_scale");
  check_close(got.gate.host(), want.gate, tolerance_of(dtype), title + ": d_gate");
}

void check_residuals() {
  for (const DType dtype : kTypes)
    for (const auto& [rows, width] : {std::pair<int64_t, int64_t>{1, 1}, {7, 17}, {70, 48}, {3, 1024}, {5, 1025}, {330, 8}}) {
      check_scale_add(dtype, rows, width, false, false);
      check_scale_add(dtype, rows, width, true, false);
      check_scale_add(dtype, rows, width, false, true);
      check_scale_add_backward(dtype, rows, width, false, false, false);
      check_scale_add_backward(dtype, rows, width, true, false, true);
      check_scale_add_backward(dtype, rows, width, false, true, false);
      check_swiglu_backward(dtype, rows, width);
    }
}

void check_add(DType dtype, int64_t n) {
  const Array a(dtype, normal(n, 16)), b(dtype, normal(n, 17)), factor(DType::Float32, std::vector<float>{5, 0.25f});
  const DeviceArray gpu_a(a), gpu_b(b), gpu_factor(factor);
  for (const bool with_a : {false, true})
    for (const bool with_factor : {false, true}) {
      const Array want(dtype, n);
      const DeviceArray got(dtype, n);
      auto run = [&](const Kernels& kernels, const void* x, const void* y, const float* f, void* out) {
        kernels.add(with_a ? x : nullptr, y, with_factor ? f + 1 : nullptr, -1.5f, out, dtype, n);
      };
      run(cpu::kernels(), a.data(), b.data(), factor.floats(), want.data());
      run(gpu(), gpu_a.data(), gpu_b.data(), gpu_factor.as<float>(), got.data());
      check_close(got.host(), want, tolerance_of(dtype),
                  "add" + text_of(dtype) + " [" + std::to_string(n) + "]" + (with_a ? ", a" : "") + (with_factor ? ", factor" : ""));
    }
  const Array want(dtype, n);
  cpu::kernels().add(a.data(), b.data(), nullptr, 2, want.data(), dtype, n);
  gpu().add(gpu_a.data(), gpu_b.data(), nullptr, 2, gpu_a.data(), dtype, n);
  check_close(gpu_a.host(), want, tolerance_of(dtype), "add" + text_of(dtype) + " [" + std::to_string(n) + "] in place");
}

// --- column sums -------------------------------------------------------------------------------------------------------

void check_column_sum(DType dtype, int64_t rows, int64_t width) {
  const Array x(dtype, normal(rows * width, 18)), want(DType::Float32, width);
  const DeviceArray on_gpu(x), got(DType::Float32, width), again(DType::Float32, width);
  cpu::kernels().column_sum(x.data(), want.floats(), dtype, rows, width);
  gpu().column_sum(on_gpu.data(), got.as<float>(), dtype, rows, width);
  gpu().column_sum(on_gpu.data(), again.as<float>(), dtype, rows, width);
  check_close(got.host(), want, 2e-4, "column_sum" + text_of(dtype, rows, width));
  check(got.host() == again.host(), "column_sum" + text_of(dtype, rows, width) + " gives the same bits again");
}

void check_column_sums() {
  constexpr std::pair<int64_t, int64_t> kShapes[] = {{0, 9}, {1, 1}, {1, 24}, {7, 17}, {16, 40}, {17, 256}, {65, 257}, {1025, 64}};
  for (const DType dtype : kTypes) {
    for (const auto& [rows, width] : kShapes) check_column_sum(dtype, rows, width);
    check_column_sum(dtype, emulated() ? 3001 : 40001, 3);
    check_column_sum(dtype, 3, emulated() ? 20000 : 2000000);
  }
}

// --- benchmark ---------------------------------------------------------------------------------------------------------

struct Sizes {
  int64_t rows, width;
  double n() const { return static_cast<double>(rows * width); }
  std::string text() const { return " [" + std::to_string(rows) + ", " + std::to_string(width) + "]"; }
};

void bench_activations(const Sizes& s, DType dtype) {
  const int64_t n = s.rows * s.width;
  const DeviceArray x = DeviceArray::normal(dtype, n), d = DeviceArray::normal(dtype, n), out(dtype, n);
  const auto element = static_cast<double>(size_of(dtype));
  for (const auto& [kind, name] : kActivations) {
    if (kind == Activation::None) continue;
    time_gpu(std::string("activation ") + name + s.text(), {.flops = 0, .bytes = 2 * element * s.n()}, dtype,
             [&, kind = kind] { gpu().activation(kind, x.data(), out.data(), dtype, n); });
    time_gpu(std::string("activation_backward ") + name + s.text(), {.flops = 0, .bytes = 3 * element * s.n()}, dtype,
             [&, kind = kind] { gpu().activation_backward(kind, x.data(), d.data(), out.data(), dtype, n); });
  }
}

void bench_joins(const Sizes& s, DType dtype) {
  const int64_t n = s.rows * s.width;
  const auto element = static_cast<double>(size_of(dtype));
  const DeviceArray x = DeviceArray::normal(dtype, n), d = DeviceArray::normal(dtype, n), out(dtype, n);
  const DeviceArray pairs = DeviceArray::normal(dtype, 2 * n), d_pairs(dtype, 2 * n);
  const DeviceArray scale = DeviceArray::normal(DType::Float32, s.width), sum(DType::Float32, s.width);
  time_gpu("scale_add" + s.text(), {.flops = 0, .bytes = 3 * element * s.n()}, dtype, [&] {
    gpu().scale_add({.residual = x.data(), .branch = d.data(), .out = out.data(), .dtype = dtype, .rows = s.rows, .width = s.width,
                     .scale = scale.as<float>(), .gate = nullptr});
  });
  time_gpu("scale_add_backward" + s.text(), {.flops = 0, .bytes = 3 * element * s.n()}, dtype, [&] {
    gpu().scale_add_backward({.d_out = d.data(), .branch = x.data(), .d_branch = out.data(), .dtype = dtype, .rows = s.rows,
                              .width = s.width, .scale = scale.as<float>(), .gate = nullptr, .d_scale = sum.as<float>(),
                              .d_gate = nullptr});
  });
  time_gpu("swiglu_backward" + s.text(), {.flops = 0, .bytes = 5 * element * s.n()}, dtype,
           [&] { gpu().swiglu_backward(pairs.data(), d.data(), d_pairs.data(), dtype, s.rows, s.width); });
  time_gpu("add" + s.text(), {.flops = 0, .bytes = 3 * element * s.n()}, dtype,
           [&] { gpu().add(x.data(), d.data(), nullptr, 1, out.data(), dtype, n); });
  time_gpu("column_sum" + s.text(), {.flops = 0, .bytes = element * s.n()}, dtype,
           [&] { gpu().column_sum(x.data(), sum.as<float>(), dtype, s.rows, s.width); });
}

}  // namespace

void check_residual() {
  for (const auto& [kind, name] : kActivations)
    for (const DType dtype : kTypes)
      for (const int64_t n : {1, 7, 1025, 4096}) check_activation(kind, name, dtype, n);
  check_far_derivatives();
  check_activation_in_place();
  check_residuals();
  for (const DType dtype : kTypes)
    for (const int64_t n : {1, 17, 2050}) check_add(dtype, n);
  check_column_sums();
}

void bench_residual() {
  const int64_t rows = emulated() ? 17 : 32 * 1025;
  for (const DType dtype : kTypes) {
    bench_activations({rows, 4096}, dtype);
    bench_joins({rows, 1024}, dtype);
  }
}

}  // namespace uniflow::test
