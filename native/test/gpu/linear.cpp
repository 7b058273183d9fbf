/// Linear layers on the GPU against the CPU's in float32, on the same (rounded) inputs.
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <optional>
#include <thread>

#include "native/cuda/cublaslt.h"
#include "native/cuda/gemm.h"
#include "native/cuda/runtime.h"
#include "native/test/gpu/gpu.h"
#include "native/test/gpu/timing.h"

namespace uniflow::test {
namespace {

constexpr DType kFloat = DType::Float32, kHalf = DType::BFloat16, kEight = DType::Float8;
constexpr Activation kActivations[] = {Activation::None, Activation::Gelu, Activation::GeluTanh, Activation::QuickGelu, Activation::Silu};

double tolerance(DType dtype) { return dtype == kHalf ? 2e-2 : 2e-4; }

struct Size {
  int64_t rows, in, out;
  std::string text() const {
    const std::string inner = std::to_string(in);
    return "[" + std::to_string(rows) + ", " + inner + "] x [" + std::to_string(out) + ", " + inner + "]";
  }
};

Array random(DType dtype, int64_t n, unsigned seed, float deviation = 1) { return {dtype, normal(n, seed, deviation)}; }

Array widened(const Array& a) {
  Array out(kFloat, a.size());
  for (int64_t i = 0; i < a.size(); ++i) out.set(i, a[i]);
  return out;
}

float deviation_of_weights(int64_t in) { return 1 / std::sqrt(static_cast<float>(in)); }

/// The largest difference, relative to the largest value.
double error_of(const Array& got, const Array& want) {
  double error = 0, largest = 1;
  for (int64_t i = 0; i < want.size(); ++i) {
    const double e = std::abs(got[i] - want[i]);
    if (!(e <= error)) error = std::isfinite(e) ? e : std::numeric_limits<double>::infinity();
    largest = std::max(largest, std::abs(want[i]));
  }
  return error / largest;
}

double cosine_of(const Array& got, const Array& want) {
  double dot = 0, a = 0, b = 0;
  for (int64_t i = 0; i < want.size(); ++i) dot += got[i] * want[i], a += got[i] * got[i], b += want[i] * want[i];
  return dot / std::sqrt(a * b);
}

struct Options {
  Activation activation = Activation::None;
  bool bias = false, scale = false, residual = false;
};

template <class Body>
void for_all_options(Body&& body) {
  for (Activation a : kActivations)
    for (bool bias : {false, true})
      for (bool scale : {false, true})
        for (bool residual : {false, true}) body(Options{a, bias, scale, residual});
}

/// A layer with random values. `packing` is the type of the packed weight; none: it stays plain.
struct Layer {
  Layer(Size s, DType x_dtype, DType out_dtype, std::optional<DType> packing_dtype)
      : size(s),
        host_x(random(x_dtype, s.rows * s.in, 1)),
        host_weight(random(packing_dtype == kFloat ? kFloat : x_dtype, s.out * s.in, 2, deviation_of_weights(s.in))),
        host_bias(random(kFloat, s.out, 3)),
        host_scale(random(kFloat, s.out, 4)),
        host_residual(random(out_dtype, s.rows * s.out, 5)),
        packing(packing_dtype ? gpu().linear_packing(s.out, s.in, *packing_dtype) : nullptr),
        x(host_x),
        weight(host_weight),
        packed(DType::UInt8, packing ? gpu().packed_bytes(*packing) : 0),
        bias(host_bias),
        scale(host_scale),
        residual(host_residual) {
    if (packing) gpu().pack(*packing, weight.data(), host_weight.dtype(), packed.data());
  }

  void queue(const Options& o, const DeviceArray& out) const {
    gpu().linear({.x = x.data(), .weight = packing ? packed.data() : weight.data(), .packing = packing.get(), .out = out.data(),
                  .rows = size.rows, .in = size.in, .width = size.out, .x_dtype = x.dtype(), .out_dtype = out.dtype(),
                  .bias = o.bias ? bias.as<float>() : nullptr, .scale = o.scale ? scale.as<float>() : nullptr,
                  .residual = o.residual ? residual.data() : nullptr, .activation = o.activation});
  }
  Array run(const Options& o) const {
    const DeviceArray out(residual.dtype(), size.rows * size.out);
    queue(o, out);
    return out.host();
  }
  Array want(const Options& o) const {
    Array out(kFloat, size.rows * size.out);
    const Array wide_x = widened(host_x), wide_weight = widened(host_weight), wide_residual = widened(host_residual);
    cpu::kernels().linear({.x = wide_x.data(), .weight = wide_weight.data(), .packing = nullptr, .out = out.data(), .rows = size.rows,
                           .in = size.in, .width = size.out, .x_dtype = kFloat, .out_dtype = kFloat,
                           .bias = o.bias ? host_bias.floats() : nullptr, .scale = o.scale ? host_scale.floats() : nullptr,
                           .residual = o.residual ? wide_residual.data() : nullptr, .activation = o.activation});
    return out;
  }

  Size size;
  Array host_x, host_weight, host_bias, host_scale, host_residual;
  std::shared_ptr<const Packing> packing;
  DeviceArray x, weight, packed, bias, scale, residual;
};

std::string title(const Size& s, DType x, DType out, std::optional<DType> packing) {
  const std::string weight = packing ? std::string(name_of(*packing)) + " packed" : "plain";
  return std::string(name_of(x)) + " to " + name_of(out) + ", " + weight + ", " + s.text();
}

void check_options(const Size& s, DType x, DType out, std::optional<DType> packing) {
  const std::string name = "linear, " + title(s, x, out, packing) + ", every combination of options";
  attempt(name, [&] {
    const Layer layer(s, x, out, packing);
    double worst = 0;
    for_all_options([&](const Options& o) { worst = std::max(worst, error_of(layer.run(o), layer.want(o))); });
    const bool half = out == kHalf || x == kHalf;
    check_below(worst, tolerance(half ? kHalf : kFloat), name);
  });
}

void check_packing(int64_t out, int64_t in, DType dtype) {
  const std::string name = std::string(name_of(dtype)) + " [" + std::to_string(out) + ", " + std::to_string(in) + "]";
  const auto packing = gpu().linear_packing(out, in, dtype);
  const int64_t row = (in * size_of(dtype) + 15) / 16 * 16;  // aligned for the tensor cores' loads
  check(gpu().packed_bytes(*packing) == out * row, "bytes of a packed weight, " + name);
  for (DType from : {kFloat, kHalf}) {
    const Array plain = random(from, out * in, 6);
    const DeviceArray given(plain), packed(DType::UInt8, gpu().packed_bytes(*packing)), back(kFloat, out * in);
    gpu().pack(*packing, given.data(), from, packed.data());
    gpu().unpack(*packing, packed.data(), back.data(), kFloat);
    Array want(dtype, out * in);
    for (int64_t i = 0; i < want.size(); ++i) want.set(i, plain[i]);
    check(back.host() == widened(want), std::string("packed from ") + name_of(from) + " and unpacked, " + name);
  }
}

/// d_x = d W, d_weight = d^T x, d_bias = sums of d's columns: each is a layer of the CPU, of transposed matrices.
struct Gradients {
  Array d_x, d_weight, d_bias;
};

Array transposed(const Array& a, int64_t rows, int64_t columns) {
  Array out(kFloat, a.size());
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) out.set(c * rows + r, a[r * columns + c]);
  return out;
}

/// a [rows, inner] b [columns, inner]^T
Array product(const Array& a, const Array& b, int64_t rows, int64_t inner, int64_t columns) {
  Array out(kFloat, rows * columns);
  cpu::kernels().linear({.x = a.data(), .weight = b.data(), .packing = nullptr, .out = out.data(), .rows = rows, .in = inner,
                         .width = columns, .x_dtype = kFloat, .out_dtype = kFloat});
  return out;
}

Gradients want_gradients(const Size& s, const Array& x, const Array& weight, const Array& d) {
  const Array d_transposed = transposed(d, s.rows, s.out);
  return {product(widened(d), transposed(weight, s.out, s.in), s.rows, s.out, s.in),
          product(d_transposed, transposed(x, s.rows, s.in), s.out, s.rows, s.in),
          product(d_transposed, Array(kFloat, s.rows, 1.0), s.out, s.rows, 1)};
}

void check_backward(const Size& s, DType dtype) {
  const Array x = random(dtype, s.rows * s.in, 1), weight = random(dtype, s.out * s.in, 2, deviation_of_weights(s.in)),
              d = random(dtype, s.rows * s.out, 3);
  const DeviceArray gpu_x(x), gpu_weight(weight), gpu_d(d);
  const Gradients want = want_gradients(s, x, weight, d);
  double x_error = 0, weight_error = 0, bias_error = 0;
  for (int asked = 1; asked < 8; ++asked) {
    const DeviceArray d_x(dtype, x.size()), d_weight(kFloat, weight.size()), d_bias(kFloat, s.out);
    gpu().linear_backward({.x = gpu_x.data(), .weight = gpu_weight.data(), .d_out = gpu_d.data(), .dtype = dtype, .rows = s.rows,
                           .in = s.in, .out = s.out, .d_x = asked & 1 ? d_x.data() : nullptr,
                           .d_weight = asked & 2 ? d_weight.as<float>() : nullptr,
                           .d_bias = asked & 4 ? d_bias.as<float>() : nullptr});
    if (asked & 1) x_error = std::max(x_error, error_of(d_x.host(), want.d_x));
    if (asked & 2) weight_error = std::max(weight_error, error_of(d_weight.host(), want.d_weight));
    if (asked & 4) bias_error = std::max(bias_error, error_of(d_bias.host(), want.d_bias));
  }
  const std::string name = std::string(", ") + name_of(dtype) + ", " + s.text();
  check_below(x_error, tolerance(dtype), "gradient of x" + name);
  check_below(weight_error, tolerance(kFloat), "gradient of the weight" + name);
  check_below(bias_error, tolerance(kFloat), "gradient of the bias" + name);
}

/// Rows of x and out that begin at any element: what a slice of a tensor of odd width gives.
void check_misaligned(DType dtype) {
  const Size s{5, 24, 16};
  const Layer layer(s, dtype, dtype, std::nullopt);
  const Array shifted = [&] {
    Array a(dtype, layer.host_x.size() + 1);
    for (int64_t i = 0; i < layer.host_x.size(); ++i) a.set(i + 1, layer.host_x[i]);
    return a;
  }();
  const DeviceArray x(shifted), out(dtype, s.rows * s.out + 1);
  gpu().linear({.x = x.as<std::byte>() + size_of(dtype), .weight = layer.weight.data(), .packing = nullptr,
                .out = out.as<std::byte>() + size_of(dtype), .rows = s.rows, .in = s.in, .width = s.out, .x_dtype = dtype,
                .out_dtype = dtype, .bias = layer.bias.as<float>(),
                .activation = Activation::Silu});
  const Array got = out.host(), want = layer.want({.activation = Activation::Silu, .bias = true});
  double error = 0;
  for (int64_t i = 0; i < want.size(); ++i) error = std::max(error, std::abs(got[i + 1] - want[i]));
  check_below(error, 4 * tolerance(dtype), std::string("x and out that are aligned to one element, ") + name_of(dtype));
}

/// A product that was never timed, and one that was.
void check_graph(DType dtype) {
  for (const bool known : {false, true}) {
    const Layer layer({9, 32, known ? 48 : 64}, dtype, dtype, dtype);
    const Options o{Activation::Gelu, true, true, true};
    if (known) layer.run(o);
    const DeviceArray out(dtype, layer.size.rows * layer.size.out);
    const cuda::Graph graph([&] { layer.queue(o, out); });
    graph.launch();
    graph.launch();
    check_below(error_of(out.host(), layer.want(o)), tolerance(dtype),
                std::string("linear in a graph, ") + (known ? "chosen before, " : "not chosen before, ") + name_of(dtype));
  }
}

/// The emulator refuses that by a thread that has not chosen a device: with several GPUs, it would work on the first.
void check_graph_of_another_thread() {
  const Layer layer({9, 32, 48}, kHalf, kHalf, kHalf);
  const DeviceArray out(kHalf, layer.size.rows * layer.size.out);
  auto graph = std::make_unique<cuda::Graph>([&] { layer.queue({}, out); });
  graph->launch();
  const Array want = out.host();
  std::thread([&] { graph.reset(); }).join();
  check(error_of(out.host(), want) == 0, "a graph is destroyed by another thread, and the device works");
}

/// The kernel for what cuBLASLt refuses, with operands stored either way.
void check_tiled(const Size& s, DType dtype, DType out_dtype) {
  const Array x = random(dtype, s.rows * s.in, 1), weight = random(dtype, s.out * s.in, 2, deviation_of_weights(s.in));
  const Array want = product(widened(x), widened(weight), s.rows, s.in, s.out);
  auto stored = [&](const Array& a, int64_t rows, bool transpose) {
    Array out(dtype, a.size());
    const Array values = transpose ? transposed(a, rows, s.in) : widened(a);
    for (int64_t i = 0; i < a.size(); ++i) out.set(i, values[i]);
    return DeviceArray(out);
  };
  double error = 0;
  for (const bool a_transposed : {false, true})
    for (const bool b_transposed : {false, true}) {
      const DeviceArray a = stored(x, s.rows, a_transposed), b = stored(weight, s.out, !b_transposed), out(out_dtype, want.size());
      cuda::multiply_tiled({.a = a.data(), .b = b.data(), .out = out.data(), .rows = s.rows, .inner = s.in, .columns = s.out, .dtype = dtype,
                            .out_dtype = out_dtype, .a_transposed = a_transposed, .b_transposed = b_transposed});
      error = std::max(error, error_of(out.host(), want));
    }
  check_below(error, tolerance(out_dtype), std::string("a product by tiles, ") + name_of(dtype) + " to " + name_of(out_dtype) + ", " + s.text());
}

/// Only the emulator counts products. It has an algorithm that fails when it is run, too: no case here would pass if that was not left out.
void check_choices() {
#ifdef UNIFLOW_EMULATED
  const Layer first({200, 48, 56}, kHalf, kHalf, kHalf), similar({207, 48, 56}, kHalf, kHalf, kHalf), other({230, 48, 56}, kHalf, kHalf, kHalf);
  auto products_of = [](const Layer& layer) {
    const uint64_t before = emulator::cublaslt_products();
    layer.run({});
    return emulator::cublaslt_products() - before;
  };
  check(products_of(first) > 1 && products_of(first) == 1, "the first product of a size times the algorithms, the next does not");
  check(products_of(similar) == 1, "nor does one of nearly as many rows");
  check(products_of(other) > 1, "one of more rows does");
#endif
}

/// An environment is found by its programs on the PATH, wherever it is.
void check_wheels() {
  namespace fs = std::filesystem;
  const fs::path root = fs::temp_directory_path() / ("uniflow-wheels-" + std::to_string(getpid()));
  const fs::path wheel = root / "lib/python3.12/site-packages/nvidia/cu13/lib/libcublasLt.so.13", conda = root / "lib/libcublasLt.so.12";
  for (const fs::path& file : {wheel, conda}) {
    fs::create_directories(file.parent_path());
    std::ofstream(file) << "";
  }
  const std::string path = std::getenv("PATH") ? std::getenv("PATH") : "";
  auto found = [](const fs::path& file) {
    const auto files = cuda::cublaslt_files();
    return std::ranges::find(files, file.string()) != files.end();
  };
  const bool before = found(wheel) || found(conda);
  setenv("PATH", (path + ":" + (root / "bin").string() + "/").c_str(), 1);
  check(!before && found(wheel) && found(conda), "cuBLASLt is found below the prefix of a program on the PATH");
  setenv("PATH", path.c_str(), 1);
  fs::remove_all(root);
}

// --- float8 --------------------------------------------------------------------------------------------------------------

bool has_float8() { return cuda::properties().capability >= 89; }

/// The value of a code, by its definition.
double value_of(int code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  if (exponent == 15 && mantissa == 7) return NAN;
  const double magnitude = exponent == 0 ? mantissa * 0x1p-9 : (8 + mantissa) * std::ldexp(1.0, exponent - 10);
  return code & 0x80 ? -magnitude : magnitude;
}

/// Every code unpacked, and packed again: with the largest value (0x7e, 448) in each row, the rows' factors are 1.
void check_codes() {
  constexpr int64_t kRows = 32, kWidth = 16;
  Array packed(DType::UInt8, kRows * kWidth + kRows * 4);
  for (int64_t r = 0, code = 0; r < kRows; ++r) {
    packed.set(r * kWidth, 0x7e);
    for (int64_t c = 1; c < kWidth; ++c) packed.set(r * kWidth + c, static_cast<double>(code++ % 256));
    const float one = 1;
    std::memcpy(packed.bytes() + kRows * kWidth + r * 4, &one, 4);
  }
  const auto packing = gpu().linear_packing(kRows, kWidth, kEight);
  check(gpu().packed_bytes(*packing) == packed.size(), "bytes of a packed float8 weight");
  const DeviceArray given(packed), values(kFloat, kRows * kWidth), again(DType::UInt8, packed.size());
  gpu().unpack(*packing, given.data(), values.data(), kFloat);
  gpu().pack(*packing, values.data(), kFloat, again.data());
  const Array got = values.host(), codes = again.host();
  int wrong_values = 0, wrong_codes = 0;
  for (int64_t i = 0; i < got.size(); ++i) {
    const double want = value_of(packed.bytes()[i]);
    wrong_values += !(got[i] == want || (std::isnan(want) && std::isnan(got[i])));
    wrong_codes += std::isnan(want) ? (codes.bytes()[i] & 0x7f) != 0x7f : codes.bytes()[i] != packed.bytes()[i];
  }
  check(wrong_values == 0, "all 256 float8 codes to float32", std::to_string(wrong_values) + " wrong");
  check(wrong_codes == 0, "all 256 float8 codes and back", std::to_string(wrong_codes) + " wrong");
}

/// Halfway between two neighbours the even code, and the nearer one on either side of that.
void check_rounding() {
  constexpr int64_t kWidth = 512;
  std::vector<float> row(16 * kWidth, 0);
  std::vector<int> want(row.size(), 0);
  row[0] = 448, want[0] = 0x7e;
  for (int code = 0; code < 0x7e; ++code) {
    const auto half = static_cast<float>((value_of(code) + value_of(code + 1)) / 2);
    const auto at = static_cast<size_t>(1 + 4 * code);
    row[at] = half, want[at] = code % 2 == 0 ? code : code + 1;
    row[at + 1] = -half, want[at + 1] = want[at] | 0x80;
    row[at + 2] = std::nextafter(half, 0.0f), want[at + 2] = code;
    row[at + 3] = std::nextafter(half, 1e9f), want[at + 3] = code + 1;
  }
  const auto packing = gpu().linear_packing(16, kWidth, kEight);
  const DeviceArray given(Array(kFloat, row)), packed(DType::UInt8, gpu().packed_bytes(*packing));
  gpu().pack(*packing, given.data(), kFloat, packed.data());
  const Array codes = packed.host();
  int wrong = 0;
  for (int64_t i = 0; i < kWidth; ++i) wrong += codes.bytes()[i] != want[static_cast<size_t>(i)];
  check(wrong == 0, "float8 rounds to the nearest, ties to even", std::to_string(wrong) + " wrong");
}

void check_float8(const Size& s, DType x, DType out) {
  const std::string name = "linear, " + title(s, x, out, kEight) + ", every combination of options";
  attempt(name, [&] {
    const Layer layer(s, x, out, kEight);
    double lowest = 1;
    for_all_options([&](const Options& o) { lowest = std::min(lowest, cosine_of(layer.run(o), layer.want(o))); });
    check(lowest > 0.998, name, "cosine " + text("%.5f", lowest));
  });
}

/// Rows and columns of very different sizes, and a row of zeros: each has a factor of its own.
void check_float8_scales() {
  const Size s{6, 64, 32};
  Array x = random(kHalf, s.rows * s.in, 1), weight = random(kHalf, s.out * s.in, 2);
  for (int64_t i = 0; i < x.size(); ++i) x.set(i, i < s.in ? 0 : std::ldexp(x[i], static_cast<int>(12 * (i / s.in)) - 36));
  for (int64_t i = 0; i < weight.size(); ++i) weight.set(i, std::ldexp(weight[i], static_cast<int>(i / s.in) - 16));
  const auto packing = gpu().linear_packing(s.out, s.in, kEight);
  const DeviceArray gpu_x(x), gpu_weight(weight), packed(DType::UInt8, gpu().packed_bytes(*packing)), out(kHalf, s.rows * s.out);
  gpu().pack(*packing, gpu_weight.data(), kHalf, packed.data());
  gpu().linear({.x = gpu_x.data(), .weight = packed.data(), .packing = packing.get(), .out = out.data(), .rows = s.rows, .in = s.in,
                .width = s.out, .x_dtype = kHalf, .out_dtype = kHalf});
  const Array got = out.host(), want = product(widened(x), widened(weight), s.rows, s.in, s.out);
  double lowest = 1;
  bool zero = true;
  for (int64_t c = 0; c < s.out; ++c) zero &= got[c] == 0;
  for (int64_t r = 1; r < s.rows; ++r) {  // over the columns of a row, each brought to its own size
    Array a(kFloat, s.out), b(kFloat, s.out);
    for (int64_t c = 0; c < s.out; ++c) {
      const int shift = 16 - static_cast<int>(c) + 36 - 12 * static_cast<int>(r);
      a.set(c, std::ldexp(got[r * s.out + c], shift));
      b.set(c, std::ldexp(want[r * s.out + c], shift));
    }
    lowest = std::min(lowest, cosine_of(a, b));
  }
  check(zero, "float8: a row of zeros stays zero");
  check(lowest > 0.998, "float8: rows and columns of very different sizes", "cosine " + text("%.5f", lowest));
}

void check_float8_refusals() {
  for (const auto& [out, in] : {std::pair<int64_t, int64_t>{17, 32}, {32, 24}, {1, 16}}) {
    const std::string code = error_code([&, out = out, in = in] { gpu().linear_packing(out, in, kEight); });
    check(code == "UNSUPPORTED", "float8 refuses [" + std::to_string(out) + ", " + std::to_string(in) + "]", code);
  }
}

void check_all_float8() {
  check_float8_refusals();
  if (!has_float8()) {
    const auto packing = gpu().linear_packing(16, 16, kEight);
    const DeviceArray plain(Array(kFloat, 256)), packed(DType::UInt8, gpu().packed_bytes(*packing));
    const std::string code = error_code([&] { gpu().pack(*packing, plain.data(), kFloat, packed.data()); });
    return check(code == "UNSUPPORTED", "float8 is refused by a GPU that has none", code);
  }
  check_codes();
  check_rounding();
  check_float8({1, 16, 16}, kHalf, kHalf);
  check_float8({17, 64, 48}, kHalf, kHalf);
  check_float8({17, 64, 48}, kHalf, kFloat);
  check_float8({7, 4128, 16}, kHalf, kHalf);  // longer than a warp's registers
  for (const int64_t in : {256, 272, 512, 1024, 2064}) check_float8({3, in, 16}, kHalf, kHalf);  // a lane keeps 1, 2, 2, 4 and 16 vectors
  check_float8({7, 4128, 16}, kFloat, kFloat);
  check_float8_scales();
}

// --- benchmarks ----------------------------------------------------------------------------------------------------------

void bench(const char* what, const Size& s, DType packing_dtype, const Options& o) {
  const auto packing = gpu().linear_packing(s.out, s.in, packing_dtype);
  const DeviceArray x = DeviceArray::normal(kHalf, s.rows * s.in),
                    weight = DeviceArray::normal(kHalf, s.out * s.in, deviation_of_weights(s.in)),
                    packed(DType::UInt8, gpu().packed_bytes(*packing)), bias = DeviceArray::normal(kFloat, s.out),
                    scale = DeviceArray::normal(kFloat, s.out),
                    residual = DeviceArray::normal(kHalf, s.rows * s.out), out(kHalf, s.rows * s.out);
  gpu().pack(*packing, weight.data(), kHalf, packed.data());
  const auto rows = static_cast<double>(s.rows), in = static_cast<double>(s.in), width = static_cast<double>(s.out);
  const Work work{.flops = 2 * rows * in * width,
                  .bytes = 2 * rows * in + static_cast<double>(packed.bytes()) + 2 * rows * width * (o.residual ? 2 : 1)};
  // float8 is held against what bfloat16 can do
  time_gpu(std::string(what) + (packing_dtype == kEight ? " float8 " : " ") + s.text(), work, kHalf, [&] {
    gpu().linear({.x = x.data(), .weight = packed.data(), .packing = packing.get(), .out = out.data(), .rows = s.rows, .in = s.in,
                  .width = s.out, .x_dtype = kHalf, .out_dtype = kHalf, .bias = o.bias ? bias.as<float>() : nullptr,
                  .scale = o.scale ? scale.as<float>() : nullptr,
                  .residual = o.residual ? residual.data() : nullptr, .activation = o.activation});
  });
}

void bench_backward(const Size& s) {
  const DeviceArray x = DeviceArray::normal(kHalf, s.rows * s.in),
                    weight = DeviceArray::normal(kHalf, s.out * s.in, deviation_of_weights(s.in)),
                    d = DeviceArray::normal(kHalf, s.rows * s.out), d_x(kHalf, s.rows * s.in), d_weight(kFloat, s.out * s.in),
                    d_bias(kFloat, s.out);
  const auto rows = static_cast<double>(s.rows), in = static_cast<double>(s.in), width = static_cast<double>(s.out);
  time_gpu("backward " + s.text(), {.flops = 4 * rows * in * width, .bytes = 4 * rows * (in + width) + 6 * in * width}, kHalf, [&] {
    gpu().linear_backward({.x = x.data(), .weight = weight.data(), .d_out = d.data(), .dtype = kHalf, .rows = s.rows, .in = s.in,
                           .out = s.out, .d_x = d_x.data(), .d_weight = d_weight.as<float>(), .d_bias = d_bias.as<float>()});
  });
}

/// A row: whether the library takes the product, or why it fails.
void probe(const std::string& name, const cuda::Product& p) {
  if (!row_wanted(name, p.dtype)) return;
  std::string answer;
  try {
    answer = cuda::multiply(p) ? "taken" : "refused";
    DeviceArray(kFloat, 1).host();
  } catch (const std::exception& e) {
    answer = std::string("failed: ") + e.what();
  }
  add_row(name, p.dtype, 0, {{"answer", answer}}, answer);
}

}  // namespace

void bench_probe() {
  constexpr int64_t kRows = 256;
  const Size sizes[] = {{kRows, 1024, 3072}, {kRows, 1024, 4096}, {kRows, 4096, 1024}, {kRows, 588, 1024}, {kRows, 592, 1024}, {kRows, 1024, 588}, {255, 1023, 1021}};
  for (const Size& full : sizes) {
    const Size s = emulated() ? Size{full.rows % 16 + 16, full.in % 16 + 16, full.out % 16 + 16} : full;
    const DeviceArray x = DeviceArray::normal(kFloat, s.rows * s.in), weight = DeviceArray::normal(kFloat, s.out * s.in),
                      bias = DeviceArray::normal(kFloat, s.out), add(kFloat, s.rows * s.out), out(kFloat, s.rows * s.out);
    const DeviceArray ones(Array(kFloat, std::max(s.rows, s.out), 1.0));
    for (const auto& [dtype, out_dtype] : {std::pair{kHalf, kHalf}, {kHalf, kFloat}, {kFloat, kFloat}, {kEight, kHalf}, {kEight, kFloat}}) {
      if (dtype == kEight && !has_float8()) continue;
      const std::string types = std::string(name_of(dtype)) + " to " + name_of(out_dtype) + " " + s.text();
      cuda::Product plain{.a = x.data(), .b = weight.data(), .out = out.data(), .rows = s.rows, .inner = s.in, .columns = s.out, .dtype = dtype,
                          .out_dtype = out_dtype, .b_transposed = true};
      probe(types, plain);
      if (dtype == kEight) plain.a_scale = plain.b_scale = ones.as<float>(), probe(types + ", scales", plain);
      for (const DType bias_dtype : {kFloat, kHalf}) {
        cuda::Product p = plain;
        p.bias = bias.data(), p.bias_dtype = bias_dtype;
        probe(types + ", bias " + name_of(bias_dtype), p);
        p.gelu_tanh = true;
        probe(types + ", bias " + name_of(bias_dtype) + ", GELU", p);
        p.gelu_tanh = false, p.add = add.data();
        probe(types + ", bias " + name_of(bias_dtype) + ", residual", p);
      }
    }
  }
}

void check_linear() {
  for (const Size& s : {Size{1, 1, 1}, {7, 17, 1}, {17, 7, 33}, {1025, 17, 7}, {3, 48, 1025}, {5, 64, 64}}) {
    for (const std::optional<DType>& packing : {std::optional<DType>(), std::optional(kFloat)}) check_options(s, kFloat, kFloat, packing);
    for (const std::optional<DType>& packing : {std::optional<DType>(), std::optional(kHalf)}) check_options(s, kHalf, kHalf, packing);
    check_options(s, kHalf, kFloat, kHalf);  // the flow keeps its residual in float32
  }
  check_options({17, 48, 33}, kHalf, kHalf, kFloat);
  check_options({17, 48, 32}, kHalf, kHalf, kFloat);
  check_options({17, 48, 33}, kHalf, kFloat, kFloat);
  for (DType dtype : {kFloat, kHalf}) {
    for (const auto& [out, in] : {std::pair<int64_t, int64_t>{1, 1}, {7, 17}, {33, 1025}, {64, 64}}) attempt("packing", [&, out = out, in = in] { check_packing(out, in, dtype); });
    for (const Size& s : {Size{1, 1, 1}, {7, 17, 5}, {17, 7, 33}, {1025, 17, 7}, {33, 64, 48}}) attempt("gradients " + s.text(), [&] { check_backward(s, dtype); });
    attempt("misaligned", [&] { check_misaligned(dtype); });
    attempt("in a graph", [&] { check_graph(dtype); });
    const double peak = gpu().peak(dtype);
    check(std::isfinite(peak) && peak > 0, std::string("peak, ") + name_of(dtype), text("%.3g FLOP/s", peak));
  }
  for (const Size& s : {Size{1, 1, 1}, {7, 17, 5}, {33, 64, 35}, {70, 33, 31}})
    for (DType dtype : {kFloat, kHalf}) check_tiled(s, dtype, dtype);
  check_tiled({7, 17, 5}, kHalf, kFloat);
  if (emulated()) check_options({1200, 64, 16}, kHalf, kHalf, kHalf);   // there, operands of 64 Ki elements are large,
  if (emulated()) check_backward({1200, 64, 16}, kHalf);                 // and are multiplied in parts
  attempt("choices", check_choices);
  attempt("a graph of another thread", check_graph_of_another_thread);
  check_wheels();
  attempt("float8", check_all_float8);
}

void bench_linear() {
  const Size up = emulated() ? Size{33, 64, 128} : Size{32800, 1024, 4096}, down = emulated() ? Size{33, 128, 64} : Size{32800, 4096, 1024};
  const Options gelu{Activation::Gelu, true, false, false}, scaled{Activation::None, true, true, true},
      plain{Activation::None, true, false, false};
  for (DType dtype : {kHalf, kEight}) {
    if (dtype == kEight && !has_float8()) continue;
    bench("bias, GELU", up, dtype, gelu);
    bench("bias, scale, residual", down, dtype, scaled);
  }
  bench("bias", emulated() ? Size{33, 64, 96} : Size{8192, 1024, 3072}, kHalf, plain);
  bench_backward(up);
}

}  // namespace uniflow::test
