/// Casts, gated activations, rotary positions, the Euler step, and the moving of bytes on the GPU against the CPU's.
#include "native/test/gpu/gpu.h"

namespace uniflow::test {
namespace {

constexpr DType kTypes[] = {DType::BFloat16, DType::Float32};
constexpr double kUntouched = 77;

double tolerance_of(DType dtype) { return dtype == DType::BFloat16 ? 2e-2 : 2e-4; }

std::string text_of(DType dtype) { return dtype == DType::BFloat16 ? " bfloat16" : " float32"; }
std::string text_of(const Shape& shape) { return " " + to_string(shape); }

std::byte* at(void* p, int64_t bytes) { return static_cast<std::byte*>(p) + bytes; }

// --- casts -------------------------------------------------------------------------------------------------------------

/// Every bit: rounding is to nearest, ties to even, on both.
void check_cast(DType from, DType to, int64_t n) {
  std::vector<float> values = normal(n, 1, 100);
  const float special[] = {0, -0.0f, 1.00390625f, 1.01171875f, 3.4e38f, std::numeric_limits<float>::infinity()};  // two ties, an overflow
  std::copy_n(special, std::min<int64_t>(n, 6), values.begin());
  const Array x(from, values), want(to, n);
  const DeviceArray on_gpu(x), got(to, n);
  cpu::kernels().cast(x.data(), from, want.data(), to, n);
  gpu().cast(on_gpu.data(), from, got.data(), to, n);
  check(got.host() == want, "cast" + text_of(from) + " to" + text_of(to) + text_of({n}));
}

void check_cast_nan() {
  const Array x(DType::Float32, 9, std::numeric_limits<double>::quiet_NaN());
  const DeviceArray on_gpu(x), got(DType::BFloat16, 9), back(DType::Float32, 9);
  gpu().cast(on_gpu.data(), DType::Float32, got.data(), DType::BFloat16, 9);
  gpu().cast(got.data(), DType::BFloat16, back.data(), DType::Float32, 9);
  const Array out = back.host();
  check(std::all_of(out.floats(), out.floats() + 9, [](float v) { return std::isnan(v); }), "cast keeps NaN");
}

/// All 65536 values, a NaN with its payload.
void check_widening() {
  const Array x(DType::BFloat16, 1 << 16), want(DType::Float32, 1 << 16);
  for (int64_t i = 0; i < x.size(); ++i) static_cast<bf16*>(x.data())[i].bits = static_cast<uint16_t>(i);
  const DeviceArray on_gpu(x), got(DType::Float32, x.size());
  cpu::kernels().cast(x.data(), DType::BFloat16, want.data(), DType::Float32, x.size());
  gpu().cast(on_gpu.data(), DType::BFloat16, got.data(), DType::Float32, x.size());
  check(got.host() == want, "cast of every bfloat16");
}

// --- gated activations, the Euler step ---------------------------------------------------------------------------------

void check_swiglu(DType dtype, int64_t rows, int64_t n) {
  const Array x(dtype, normal(2 * rows * n, 2, 3)), want(dtype, rows * n);
  const DeviceArray on_gpu(x), got(dtype, rows * n);
  cpu::kernels().swiglu(x.data(), want.data(), dtype, rows, n);
  gpu().swiglu(on_gpu.data(), got.data(), dtype, rows, n);
  check_close(got.host(), want, tolerance_of(dtype), "swiglu" + text_of(dtype) + text_of({rows, 2 * n}));
}

void check_silu_sum(DType dtype, int64_t rows, int64_t n, int64_t y_stride) {
  const Array x(DType::Float32, normal(rows * n, 3, 3)), y(DType::Float32, normal((rows - 1) * y_stride + n, 4)), want(dtype, rows * n);
  const DeviceArray gpu_x(x), gpu_y(y), got(dtype, rows * n);
  cpu::kernels().silu_sum(x.floats(), y.floats(), y_stride, want.data(), dtype, rows, n);
  gpu().silu_sum(gpu_x.as<float>(), gpu_y.as<float>(), y_stride, got.data(), dtype, rows, n);
  check_close(got.host(), want, tolerance_of(dtype),
              "silu_sum to" + text_of(dtype) + text_of({rows, n}) + ", rows " + std::to_string(y_stride) + " apart");
}

void check_euler(int64_t n) {
  const Array v(DType::Float32, normal(n, 5)), v0(DType::Float32, normal(n, 6));
  const DeviceArray gpu_v(v), gpu_v0(v0);
  for (const bool guided : {false, true}) {
    const Array x(DType::Float32, normal(n, 7));
    const DeviceArray on_gpu(x);
    cpu::kernels().euler(x.floats(), v.floats(), guided ? v0.floats() : nullptr, 2.5f, 0.25f, n);
    gpu().euler(on_gpu.as<float>(), gpu_v.as<float>(), guided ? gpu_v0.as<float>() : nullptr, 2.5f, 0.25f, n);
    check_close(on_gpu.host(), x, 1e-6, "euler" + text_of({n}) + (guided ? ", guided" : ""));
  }
}

// --- rotary positions --------------------------------------------------------------------------------------------------

struct Rope {
  int64_t batch, seq, heads, head_dim, prefix;
  bool inverse = false;

  int64_t size() const { return batch * seq * 3 * heads * head_dim; }
  int64_t angles() const { return (seq - prefix) * head_dim; }
};

/// Tables of any numbers: nothing may rely on cosines being the same in both halves.
void check_rope(DType dtype, const Rope& r) {
  const Array x(dtype, normal(r.size(), 8)), want(dtype, r.size());
  const Array cosine(DType::Float32, normal(r.angles(), 9)), sine(DType::Float32, normal(r.angles(), 10));
  const DeviceArray gpu_x(x), got(dtype, r.size()), gpu_cosine(cosine), gpu_sine(sine);
  auto run = [&](const Kernels& kernels, const void* from, void* to, const void* c, const void* s) {
    kernels.rope({.qkv = from, .out = to, .dtype = dtype, .batch = r.batch, .seq = r.seq, .heads = r.heads, .head_dim = r.head_dim,
                  .prefix = r.prefix, .cosine = static_cast<const float*>(c), .sine = static_cast<const float*>(s), .inverse = r.inverse});
  };
  run(cpu::kernels(), x.data(), want.data(), cosine.data(), sine.data());
  run(gpu(), gpu_x.data(), got.data(), gpu_cosine.data(), gpu_sine.data());
  const std::string title = "rope" + text_of(dtype) + text_of({r.batch, r.seq, r.heads, r.head_dim}) + ", prefix " +
                            std::to_string(r.prefix) + (r.inverse ? ", inverse" : "");
  check_close(got.host(), want, tolerance_of(dtype), title);
  run(gpu(), gpu_x.data(), gpu_x.data(), gpu_cosine.data(), gpu_sine.data());
  check_close(gpu_x.host(), want, tolerance_of(dtype), title + ", in place");
}

void check_rope_table(int64_t rows, int64_t cols, int64_t head_dim, RopeUnit unit) {
  const int64_t n = 2 * rows * cols * head_dim;
  const Array want(DType::Float32, n);
  const DeviceArray got(DType::Float32, n);
  cpu::kernels().rope_table(rows, cols, head_dim, 100, unit, want.floats());
  gpu().rope_table(rows, cols, head_dim, 100, unit, got.as<float>());
  check_close(got.host(), want, 2e-7, "rope_table" + text_of({rows, cols, head_dim}));
}

// --- moving bytes ------------------------------------------------------------------------------------------------------

struct Copy {
  int64_t rows, bytes, to_stride, from_stride;
  int64_t offset = 0;  // of the first row, in both
};

void check_copy_rows(const Copy& c) {
  const auto seed = static_cast<unsigned>(c.bytes);
  const Array from(DType::UInt8, [&] {
    std::vector<float> bytes = normal(c.offset + (c.rows - 1) * c.from_stride + c.bytes, seed, 40, 128);
    for (float& b : bytes) b = std::min(std::max(b, 0.0f), 255.0f);
    return bytes;
  }());
  const DeviceArray gpu_from(from);
  for (const bool zeros : {false, true}) {
    const Array want(DType::UInt8, c.offset + (c.rows - 1) * c.to_stride + c.bytes, kUntouched);
    const DeviceArray got(want);
    auto run = [&](const Kernels& kernels, void* to, void* source) {
      kernels.copy_rows(at(to, c.offset), c.to_stride, zeros ? nullptr : at(source, c.offset), c.from_stride, c.bytes, c.rows);
    };
    run(cpu::kernels(), want.data(), from.data());
    run(gpu(), got.data(), gpu_from.data());
    check(got.host() == want, "copy_rows of " + std::to_string(c.rows) + " x " + std::to_string(c.bytes) + " bytes, " +
                                  std::to_string(c.from_stride) + " to " + std::to_string(c.to_stride) + " apart, from byte " +
                                  std::to_string(c.offset) + (zeros ? ": zeros" : ""));
  }
}

void check_copies() {
  check_copy_rows({.rows = 5, .bytes = 96, .to_stride = 96, .from_stride = 96});
  check_copy_rows({.rows = 1, .bytes = 7, .to_stride = 3, .from_stride = 0});
  check_copy_rows({.rows = 6, .bytes = 48, .to_stride = 144, .from_stride = 48});
  check_copy_rows({.rows = 6, .bytes = 48, .to_stride = 48, .from_stride = 0});
  check_copy_rows({.rows = 33, .bytes = 12, .to_stride = 20, .from_stride = 16});
  check_copy_rows({.rows = 9, .bytes = 34, .to_stride = 102, .from_stride = 36});
  check_copy_rows({.rows = 9, .bytes = 7, .to_stride = 11, .from_stride = 8});
  check_copy_rows({.rows = 4, .bytes = 64, .to_stride = 64, .from_stride = 128, .offset = 2});
  check_copy_rows({.rows = emulated() ? 3000 : 3000000, .bytes = 1, .to_stride = 2, .from_stride = 3});
}

void check_fill(int64_t n) {
  const Array want(DType::Float32, n, 0.3);
  const DeviceArray got(DType::Float32, n);
  gpu().fill(got.as<float>(), 0.3f, n);
  check(got.host() == want, "fill" + text_of({n}));
}

void check_count_non_finite(int64_t n) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const float bad[] = {std::numeric_limits<float>::quiet_NaN(), kInfinity, -kInfinity};
  const Array x(DType::Float32, normal(n, 12));
  int64_t placed = 0;
  for (int64_t i = n - 1; i >= 0; i -= 61) x.floats()[i] = bad[placed++ % 3];
  const DeviceArray on_gpu(x);
  const int64_t found = gpu().count_non_finite(on_gpu.as<float>(), n);
  check(found == placed, "count_non_finite" + text_of({n}), std::to_string(found) + " of " + std::to_string(placed));
}

void check_copy_rate() {
  constexpr int64_t kBytes = 1 << 16;
  const DeviceArray from = DeviceArray::normal(DType::Float32, kBytes / 4), to(DType::Float32, kBytes / 4);
  const double rate = gpu().copy_rate(to.data(), from.data(), kBytes);
  check(rate > 0 && to.host() == from.host(), "copy_rate copies", text("%.3g bytes a second", rate));
}

// --- benchmark ---------------------------------------------------------------------------------------------------------

void bench_gates(int64_t rows, int64_t n, DType dtype) {
  const double elements = static_cast<double>(rows * n), element = static_cast<double>(size_of(dtype));
  const DeviceArray pairs = DeviceArray::normal(dtype, 2 * rows * n), out(dtype, rows * n);
  time_gpu("swiglu" + text_of({rows, 2 * n}), {.flops = 0, .bytes = 3 * elements * element}, dtype,
           [&] { gpu().swiglu(pairs.data(), out.data(), dtype, rows, n); });
  const DeviceArray x = DeviceArray::normal(DType::Float32, rows * n), y = DeviceArray::normal(DType::Float32, n);
  time_gpu("silu_sum" + text_of({rows, n}), {.flops = 0, .bytes = elements * (4 + element)}, dtype,
           [&] { gpu().silu_sum(x.as<float>(), y.as<float>(), 0, out.data(), dtype, rows, n); });
}

void bench_rope(const Rope& r, DType dtype) {
  const DeviceArray x = DeviceArray::normal(dtype, r.size()), out(dtype, r.size());
  const DeviceArray cosine = DeviceArray::normal(DType::Float32, r.angles()), sine = DeviceArray::normal(DType::Float32, r.angles());
  const Work work{.flops = 0, .bytes = static_cast<double>(2 * r.size() * size_of(dtype) + 8 * r.angles())};
  time_gpu("rope" + text_of({r.batch, r.seq, 3 * r.heads * r.head_dim}), work, dtype, [&] {
    gpu().rope({.qkv = x.data(), .out = out.data(), .dtype = dtype, .batch = r.batch, .seq = r.seq, .heads = r.heads,
                .head_dim = r.head_dim, .prefix = r.prefix, .cosine = cosine.as<float>(), .sine = sine.as<float>()});
  });
}

void bench_floats(int64_t n) {
  const auto elements = static_cast<double>(n);
  const DeviceArray x = DeviceArray::normal(DType::Float32, n), v = DeviceArray::normal(DType::Float32, n);
  const DeviceArray v0 = DeviceArray::normal(DType::Float32, n), half(DType::BFloat16, n);
  time_gpu("cast float32 to bfloat16" + text_of({n}), {.flops = 0, .bytes = 6 * elements}, DType::BFloat16,
           [&] { gpu().cast(v.data(), DType::Float32, half.data(), DType::BFloat16, n); });
  time_gpu("cast bfloat16 to float32" + text_of({n}), {.flops = 0, .bytes = 6 * elements}, DType::Float32,
           [&] { gpu().cast(half.data(), DType::BFloat16, x.data(), DType::Float32, n); });
  time_gpu("euler" + text_of({n}), {.flops = 0, .bytes = 12 * elements}, DType::Float32,
           [&] { gpu().euler(x.as<float>(), v.as<float>(), nullptr, 1, 0.001f, n); });
  time_gpu("euler, guided" + text_of({n}), {.flops = 0, .bytes = 16 * elements}, DType::Float32,
           [&] { gpu().euler(x.as<float>(), v.as<float>(), v0.as<float>(), 1.5f, 0.001f, n); });
  time_gpu("fill" + text_of({n}), {.flops = 0, .bytes = 4 * elements}, DType::Float32, [&] { gpu().fill(x.as<float>(), 0, n); });
}

/// A third of each row, as qkv is split.
void bench_copy(int64_t rows, int64_t bytes) {
  const DeviceArray from(DType::UInt8, 3 * rows * bytes), to(DType::UInt8, rows * bytes);
  time_gpu("copy_rows" + text_of({rows, bytes}), {.flops = 0, .bytes = 2.0 * static_cast<double>(rows * bytes)}, DType::Float32,
           [&] { gpu().copy_rows(to.data(), bytes, from.data(), 3 * bytes, bytes, rows); });
}

}  // namespace

void check_elementwise() {
  for (const DType from : kTypes)
    for (const DType to : kTypes)
      for (const int64_t n : {1, 7, 17, 4099}) check_cast(from, to, n);
  check_cast_nan();
  check_widening();
  for (const DType dtype : kTypes)
    for (const auto& [rows, n] : {std::pair<int64_t, int64_t>{1, 1}, {7, 17}, {5, 48}, {3, 1025}}) {
      check_swiglu(dtype, rows, n);
      for (const int64_t stride : {int64_t{0}, n, n + 3, n + 4}) check_silu_sum(dtype, rows, n, stride);
    }
  for (const int64_t n : {1, 17, 2051}) check_euler(n);
  constexpr Rope kRopes[] = {{2, 5, 3, 16, 1}, {1, 7, 2, 64, 0, true}, {1, 3, 1, 4, 3}, {2, 3, 16, 64, 1}, {1, 4, 2, 20, 2, true}};
  for (const DType dtype : kTypes)
    for (const Rope& r : kRopes) check_rope(dtype, r);
  for (RopeUnit unit : {RopeUnit::Image, RopeUnit::Patch}) {
    check_rope_table(1, 1, 4, unit);
    check_rope_table(3, 5, 64, unit);
    check_rope_table(7, 2, 20, unit);
  }
  check_copies();
  for (const int64_t n : {1, 17, 5000}) check_fill(n);
  for (const int64_t n : {0, 1, 17, 5000, emulated() ? 100003 : 5000003}) check_count_non_finite(n);
  check_copy_rate();
}

void bench_elementwise() {
  const int64_t images = emulated() ? 1 : 32, tokens = emulated() ? 17 : 1025;
  for (const DType dtype : kTypes) {
    bench_gates(images * tokens, 1024, dtype);
    bench_rope({.batch = images, .seq = tokens, .heads = 16, .head_dim = 64, .prefix = 1}, dtype);
  }
  bench_floats(images * tokens * 1024);
  bench_copy(images * tokens, 2048);
}

}  // namespace uniflow::test
