/// norm and norm_backward on the GPU against the CPU's.
#include "native/test/gpu/gpu.h"

namespace uniflow::test {
namespace {

constexpr float kEps = 1e-6f;
constexpr double kUntouched = 77;

double tolerance_of(DType dtype) { return dtype == DType::BFloat16 ? 2e-2 : 2e-4; }

std::string text_of(DType dtype) { return dtype == DType::BFloat16 ? "bfloat16" : "float32"; }

enum class Modulation { None, OneRow, EachRow };
enum class Residual { None, Plain, Gated };

struct Case {
  DType x = DType::BFloat16, out = DType::BFloat16;
  int64_t rows = 5, width = 48, pad = 0;  // pad: elements between rows
  bool rms = false, weight = true, bias = true;
  Modulation modulation = Modulation::None;
  Residual residual = Residual::None;

  std::string name() const {
    const char* modulations[] = {"", ", modulated by one row", ", modulated"};
    const char* residuals[] = {"", ", of the residual", ", of the gated residual"};
    return "norm " + text_of(x) + " to " + text_of(out) + " [" + std::to_string(rows) + ", " + std::to_string(width) + "]" +
           (pad ? " rows " + std::to_string(width + pad) + " apart" : "") + (rms ? ", rms" : "") + (weight ? ", weight" : "") +
           (bias ? ", bias" : "") + modulations[static_cast<int>(modulation)] + residuals[static_cast<int>(residual)];
  }
};

/// Everything that a case reads or writes, in the host's (Array) or the device's memory (DeviceArray).
template <class A>
struct Operands {
  A x, out, weight, bias, modulation, branch, residual;

  NormArgs arguments(const Case& c) const {
    const int64_t step = c.modulation == Modulation::EachRow ? 3 * c.width : 0;
    auto part = [&](int64_t i) { return static_cast<std::byte*>(modulation.data()) + i * c.width * size_of(c.out); };
    NormArgs a{.x = x.data(), .out = out.data(), .x_dtype = c.x, .out_dtype = c.out, .rows = c.rows, .width = c.width,
               .x_stride = c.width + c.pad, .out_stride = c.width + c.pad, .rms = c.rms, .eps = kEps,
               .weight = c.weight ? static_cast<const float*>(weight.data()) : nullptr,
               .bias = c.bias ? static_cast<const float*>(bias.data()) : nullptr};
    if (c.modulation != Modulation::None) a.shift = part(0), a.scale = part(1), a.modulation_stride = step;
    if (c.residual != Residual::None) a.x = nullptr, a.residual = static_cast<float*>(residual.data());
    if (c.residual == Residual::Gated) a.branch = branch.data(), a.gate = part(2), a.gate_stride = step;
    return a;
  }
};

Operands<Array> operands_of(const Case& c) {
  const auto seed = static_cast<unsigned>(c.width * 7 + c.rows);
  const int64_t n = c.rows * (c.width + c.pad);
  return {.x = Array(c.x, normal(n, seed, 2, 0.5f)),
          .out = Array(c.out, n, kUntouched),
          .weight = Array(DType::Float32, normal(c.width, seed + 1, 0.3f, 1)),
          .bias = Array(DType::Float32, normal(c.width, seed + 2)),
          .modulation = Array(c.out, normal(3 * c.rows * c.width, seed + 3, 0.5f)),
          .branch = Array(c.out, normal(c.rows * c.width, seed + 4)),
          .residual = Array(DType::Float32, normal(c.rows * c.width, seed + 5, 2))};
}

Operands<DeviceArray> to_device(const Operands<Array>& o) {
  return {.x = DeviceArray(o.x), .out = DeviceArray(o.out), .weight = DeviceArray(o.weight), .bias = DeviceArray(o.bias),
          .modulation = DeviceArray(o.modulation), .branch = DeviceArray(o.branch), .residual = DeviceArray(o.residual)};
}

void check_case(const Case& c) {
  const Operands<Array> host = operands_of(c);
  const Operands<DeviceArray> device = to_device(host);
  cpu::kernels().norm(host.arguments(c));
  gpu().norm(device.arguments(c));
  check_close(device.out.host(), host.out, tolerance_of(c.out), c.name());
  if (c.residual == Residual::Gated) check_close(device.residual.host(), host.residual, 1e-6, c.name() + ": the residual");
}

void check_widths() {
  for (const DType dtype : {DType::BFloat16, DType::Float32}) {
    for (const int64_t width : {1, 7, 17, 48, 64, 65, 256, 588, 1024, 1025, 1536, 4096, 8191, 8192}) {
      check_case({.x = dtype, .out = dtype, .width = width});
      check_case({.x = dtype, .out = dtype, .rows = width < 100 ? 37 : 3, .width = width, .pad = 8, .rms = true, .bias = false});
    }
    check_case({.x = dtype, .out = dtype, .rows = 1025, .width = 72, .pad = 5, .weight = false, .bias = false});
  }
}

void check_options() {
  constexpr DType types[] = {DType::BFloat16, DType::Float32};
  for (const DType x : types)
    for (const DType out : types)
      for (const int64_t width : {64, 384, 1024, 1025, 1280})
        for (const auto modulation : {Modulation::None, Modulation::OneRow, Modulation::EachRow})
          check_case({.x = x, .out = out, .width = width, .weight = width != 384, .bias = width != 64, .modulation = modulation});
  for (const DType out : types)
    for (const int64_t width : {24, 33, 1024, 1280})
      for (const auto residual : {Residual::Plain, Residual::Gated})
        for (const auto modulation : {Modulation::OneRow, Modulation::EachRow})
          check_case({.x = out, .out = out, .rows = 9, .width = width, .modulation = modulation, .residual = residual});
}

/// The middle third of each row, where it is: as the q and k of [rows, 3 * width] are normalised.
void check_in_place() {
  for (const DType dtype : {DType::BFloat16, DType::Float32})
    for (const int64_t width : {33, 48, 1024}) {
      constexpr int64_t kRows = 6;
      const Array x(dtype, normal(kRows * 3 * width, 11, 3));
      const DeviceArray on_gpu(x);
      auto arguments = [&](void* all) {
        void* middle = static_cast<std::byte*>(all) + width * size_of(dtype);
        return NormArgs{.x = middle, .out = middle, .x_dtype = dtype, .out_dtype = dtype, .rows = kRows, .width = width,
                        .x_stride = 3 * width, .out_stride = 3 * width, .rms = true, .eps = kEps, .weight = nullptr, .bias = nullptr};
      };
      cpu::kernels().norm(arguments(x.data()));
      gpu().norm(arguments(on_gpu.data()));
      check_close(on_gpu.host(), x, tolerance_of(dtype), "norm " + text_of(dtype) + " of " + std::to_string(width) + " columns in place");
    }
}

/// Constant rows, zero rows, and rows whose mean is large beside their deviation.
void check_hard_rows() {
  for (const bool rms : {false, true})
    for (const int64_t width : {48, 1024, 1025, 2048}) {
      const Case c{.x = DType::Float32, .out = DType::Float32, .rows = 4, .width = width, .rms = rms, .weight = false, .bias = false};
      Operands<Array> host = operands_of(c);
      for (int64_t i = 0; i < width; ++i) {
        host.x.set(i, 3.3);
        host.x.set(width + i, 0);
        host.x.set(2 * width + i, host.x[2 * width + i] + 1e4);
        host.x.set(3 * width + i, 3e-3 * host.x[3 * width + i] + 1e4);  // a few units in the last place
      }
      const Operands<DeviceArray> device = to_device(host);
      cpu::kernels().norm(host.arguments(c));
      gpu().norm(device.arguments(c));
      check_close(device.out.host(), host.out, tolerance_of(c.out), c.name() + ", constant rows and a large mean");
    }
}

/// For a large constant, rounding leaves a meaningless variance; the results must still be finite.
void check_finite() {
  for (const float value : {1e15f, -3e7f}) {
    const Case c{.x = DType::Float32, .out = DType::Float32, .rows = 1, .width = 1025, .weight = false, .bias = false};
    Operands<Array> host = operands_of(c);
    host.x = Array(DType::Float32, c.width, double{value});
    const Operands<DeviceArray> device = to_device(host);
    gpu().norm(device.arguments(c));
    const Array out = device.out.host();
    const bool finite = std::all_of(out.floats(), out.floats() + out.size(), [](float v) { return std::isfinite(v); });
    check(finite, "norm of a constant row is finite");
  }
}

/// Addresses that are those of single elements only.
void check_odd_addresses() {
  for (const DType dtype : {DType::BFloat16, DType::Float32}) {
    constexpr int64_t kRows = 3, kWidth = 64;
    const Array x(dtype, normal(kRows * kWidth + 1, 5)), out(dtype, kRows * kWidth + 1, kUntouched);
    const DeviceArray gpu_x(x), gpu_out(out);
    auto arguments = [&](void* from, void* to) {
      return NormArgs{.x = static_cast<std::byte*>(from) + size_of(dtype), .out = static_cast<std::byte*>(to) + size_of(dtype),
                      .x_dtype = dtype, .out_dtype = dtype, .rows = kRows, .width = kWidth, .x_stride = kWidth, .out_stride = kWidth,
                      .rms = false, .eps = kEps, .weight = nullptr, .bias = nullptr};
    };
    cpu::kernels().norm(arguments(x.data(), out.data()));
    gpu().norm(arguments(gpu_x.data(), gpu_out.data()));
    check_close(gpu_out.host(), out, tolerance_of(dtype), "norm " + text_of(dtype) + " from the second element on");
  }
}

// --- backward ----------------------------------------------------------------------------------------------------------

struct BackwardCase {
  DType dtype = DType::BFloat16;
  int64_t rows = 5, width = 48, pad = 0;
  bool rms = false, weight = true, bias = true, scale = false, parameters = true;  // parameters: whether their gradients are asked for

  std::string name() const {
    return "norm_backward " + text_of(dtype) + " [" + std::to_string(rows) + ", " + std::to_string(width) + "]" +
           (pad ? " rows " + std::to_string(width + pad) + " apart" : "") + (rms ? ", rms" : "") + (weight ? ", weight" : "") +
           (bias ? ", bias" : "") + (scale ? ", modulated" : "") + (parameters ? "" : ", d_x alone");
  }
};

template <class A>
struct BackwardOperands {
  A x, d_out, d_x, weight, bias, scale, d_weight, d_bias, d_scale, d_shift;

  NormBackwardArgs arguments(const BackwardCase& c) const {
    auto floats = [](const A& a, bool there) { return there ? static_cast<float*>(a.data()) : nullptr; };
    auto values = [](const A& a, bool there) { return there ? a.data() : nullptr; };
    return {.x = x.data(), .d_out = d_out.data(), .d_x = d_x.data(), .dtype = c.dtype, .rows = c.rows, .width = c.width,
            .x_stride = c.width + 2 * c.pad, .d_stride = c.width + c.pad, .rms = c.rms, .eps = kEps, .weight = floats(weight, c.weight),
            .bias = floats(bias, c.bias), .scale = values(scale, c.scale), .d_weight = floats(d_weight, c.weight && c.parameters),
            .d_bias = floats(d_bias, c.bias && c.parameters), .d_scale = values(d_scale, c.scale && c.parameters),
            .d_shift = values(d_shift, c.scale && c.parameters)};
  }
};

BackwardOperands<Array> operands_of(const BackwardCase& c) {
  const auto seed = static_cast<unsigned>(c.width * 5 + c.rows);
  const int64_t n = c.rows * c.width;
  return {.x = Array(c.dtype, normal(n + 2 * c.pad * c.rows, seed, 2, 0.5f)),
          .d_out = Array(c.dtype, normal(n + c.pad * c.rows, seed + 1)),
          .d_x = Array(c.dtype, n + c.pad * c.rows, kUntouched),
          .weight = Array(DType::Float32, normal(c.width, seed + 2, 0.3f, 1)),
          .bias = Array(DType::Float32, normal(c.width, seed + 3)),
          .scale = Array(c.dtype, normal(n, seed + 4, 0.5f)),
          .d_weight = Array(DType::Float32, c.width, kUntouched),
          .d_bias = Array(DType::Float32, c.width, kUntouched),
          .d_scale = Array(c.dtype, n, kUntouched),
          .d_shift = Array(c.dtype, n, kUntouched)};
}

BackwardOperands<DeviceArray> to_device(const BackwardOperands<Array>& o) {
  return {.x = DeviceArray(o.x), .d_out = DeviceArray(o.d_out), .d_x = DeviceArray(o.d_x), .weight = DeviceArray(o.weight),
          .bias = DeviceArray(o.bias), .scale = DeviceArray(o.scale), .d_weight = DeviceArray(o.d_weight), .d_bias = DeviceArray(o.d_bias),
          .d_scale = DeviceArray(o.d_scale), .d_shift = DeviceArray(o.d_shift)};
}

void compare_backward(const BackwardCase& c) {
  const BackwardOperands<Array> host = operands_of(c);
  const BackwardOperands<DeviceArray> device = to_device(host);
  cpu::kernels().norm_backward(host.arguments(c));
  gpu().norm_backward(device.arguments(c));
  const double tolerance = tolerance_of(c.dtype);
  check_close(device.d_x.host(), host.d_x, tolerance, c.name());
  if (!c.parameters) return;
  check_close(device.d_weight.host(), host.d_weight, 2e-4, c.name() + ": d_weight");
  check_close(device.d_bias.host(), host.d_bias, 2e-4, c.name() + ": d_bias");
  if (!c.scale) return;
  check_close(device.d_scale.host(), host.d_scale, tolerance, c.name() + ": d_scale");
  check_close(device.d_shift.host(), host.d_shift, 0, c.name() + ": d_shift");
}

void check_case(const BackwardCase& c) {
  attempt(c.name(), [&] { compare_backward(c); });
}

void check_backward() {
  for (const DType dtype : {DType::BFloat16, DType::Float32}) {
    for (const int64_t width : {1, 7, 48, 65, 256, 384, 1024, 1025, 1536, 3001, 4096, 8191})
      check_case({.dtype = dtype, .rows = width < 100 ? 71 : 5, .width = width, .scale = width % 2 == 0});
    check_case({.dtype = dtype, .width = 384, .pad = 8, .rms = true, .bias = false});
    check_case({.dtype = dtype, .rows = 1, .width = 33, .pad = 3, .rms = true, .scale = true});
    check_case({.dtype = dtype, .rows = 9, .width = 64, .scale = true, .parameters = false});
    check_case({.dtype = dtype, .rows = 4, .width = 1024, .weight = false, .bias = false, .scale = true});
    check_case({.dtype = dtype, .rows = emulated() ? 5003 : 50003, .width = 8});
  }
}

/// Two runs must agree in every bit.
void check_repeats() {
  const BackwardCase c{.dtype = DType::BFloat16, .rows = emulated() ? 300 : 30000, .width = 384};
  const BackwardOperands<Array> host = operands_of(c);
  const BackwardOperands<DeviceArray> first = to_device(host), second = to_device(host);
  gpu().norm_backward(first.arguments(c));
  gpu().norm_backward(second.arguments(c));
  const bool same = first.d_weight.host() == second.d_weight.host() && first.d_bias.host() == second.d_bias.host();
  check(same, "norm_backward gives the same bits again");
}

void check_refusal() {
  const DeviceArray x(DType::Float32, 8193);
  const NormArgs a{.x = x.data(), .out = x.data(), .x_dtype = DType::Float32, .out_dtype = DType::Float32, .rows = 1, .width = 8193,
                   .x_stride = 8193, .out_stride = 8193, .rms = false, .eps = kEps, .weight = nullptr, .bias = nullptr};
  check(error_code([&] { gpu().norm(a); }) == "UNSUPPORTED", "norm refuses rows wider than registers hold");
}

// --- benchmark ---------------------------------------------------------------------------------------------------------

void bench_case(const std::string& name, const Case& c, double bytes_per_element) {
  const auto n = static_cast<double>(c.rows * c.width);
  const Operands<DeviceArray> o{.x = DeviceArray::normal(c.x, c.rows * c.width),
                                .out = DeviceArray(c.out, c.rows * c.width),
                                .weight = DeviceArray::normal(DType::Float32, c.width),
                                .bias = DeviceArray::normal(DType::Float32, c.width),
                                .modulation = DeviceArray::normal(c.out, 3 * c.rows * c.width, 0.1f),
                                .branch = DeviceArray::normal(c.out, c.rows * c.width),
                                .residual = DeviceArray::normal(DType::Float32, c.rows * c.width)};
  time_gpu(name, {.flops = 0, .bytes = n * bytes_per_element}, c.out, [&] { gpu().norm(o.arguments(c)); });
}

void bench_backward(const BackwardCase& c) {
  const int64_t n = c.rows * c.width;
  const BackwardOperands<DeviceArray> o{.x = DeviceArray::normal(c.dtype, n),
                                        .d_out = DeviceArray::normal(c.dtype, n),
                                        .d_x = DeviceArray(c.dtype, n),
                                        .weight = DeviceArray::normal(DType::Float32, c.width),
                                        .bias = DeviceArray::normal(DType::Float32, c.width),
                                        .scale = DeviceArray(c.dtype, 0),
                                        .d_weight = DeviceArray(DType::Float32, c.width),
                                        .d_bias = DeviceArray(DType::Float32, c.width),
                                        .d_scale = DeviceArray(c.dtype, 0),
                                        .d_shift = DeviceArray(c.dtype, 0)};
  const Work work{.flops = 0, .bytes = static_cast<double>(3 * n * size_of(c.dtype))};
  const std::string name = "norm_backward [" + std::to_string(c.rows) + ", " + std::to_string(c.width) + "]";
  time_gpu(name, work, c.dtype, [&] { gpu().norm_backward(o.arguments(c)); });
}

}  // namespace

void check_norm() {
  check_widths();
  check_options();
  check_in_place();
  check_hard_rows();
  check_finite();
  check_odd_addresses();
  check_backward();
  check_repeats();
  check_refusal();
}

void bench_norm() {
  const int64_t images = emulated() ? 1 : 32, tokens = emulated() ? 17 : 1025;
  const std::string size = "[" + std::to_string(images) + "*" + std::to_string(tokens) + ", 1024]";
  bench_case("LayerNorm " + size, {.rows = images * tokens, .width = 1024}, 4);
  bench_case("LayerNorm " + size, {.x = DType::Float32, .out = DType::Float32, .rows = images * tokens, .width = 1024}, 8);
  bench_case("RMSNorm " + size, {.rows = images * tokens, .width = 1024, .rms = true, .bias = false}, 4);
  // the flow head's: float32 residual read and written, branch, gate, shift and scale read, out written
  const int64_t patches = images * (tokens - 1);
  const std::string flow = "norm, gated and modulated [" + std::to_string(patches) + ", 1024]";
  bench_case(flow, {.rows = patches, .width = 1024, .modulation = Modulation::EachRow, .residual = Residual::Gated}, 18);
  bench_case(flow + ", one row", {.rows = patches, .width = 1024, .modulation = Modulation::OneRow, .residual = Residual::Gated}, 12);
  bench_backward({.rows = images * tokens, .width = 1024});
}

}  // namespace uniflow::test
