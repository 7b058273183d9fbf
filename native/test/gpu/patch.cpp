/// Pixels to patch vectors and back, tokens from patches, resized position tables.
#include "native/test/gpu/gpu.h"

namespace uniflow::test {
namespace {

constexpr float kMean[3] = {0.485f, 0.456f, 0.406f}, kStd[3] = {0.229f, 0.224f, 0.225f};
constexpr DType kFloats[] = {DType::Float32, DType::BFloat16};

struct Grid {
  int64_t batch, rows, cols, patch;

  int64_t height() const { return rows * patch; }
  int64_t width() const { return cols * patch; }
  int64_t patches() const { return batch * rows * cols; }
  int64_t size() const { return 3 * patch * patch; }
  int64_t count() const { return patches() * size(); }
  std::string text() const {
    return std::to_string(batch) + " x " + std::to_string(rows) + " x " + std::to_string(cols) + " patches of " + std::to_string(patch);
  }
};

/// The last but one needs several tiles for a row of patches; of the last, no patch fits into shared memory.
const Grid kGrids[] = {{1, 1, 1, 1},  {2, 2, 3, 1},  {2, 2, 3, 7},  {1, 3, 1, 14},   {2, 2, 16, 14}, {2, 1, 4, 16},
                       {1, 2, 2, 17}, {0, 2, 3, 7}, {1, 5, 33, 2}, {1, 2, 37, 14}, {1, 1, 2, 130}};

Array random_pixels(const Grid& g, DType dtype) {
  if (dtype == DType::Float32) return Array(dtype, normal(g.count(), 11));
  Array out(dtype, g.count());
  for (int64_t i = 0; i < out.size(); ++i) out.set(i, static_cast<double>((i * 7 + i / 251) % 256));
  return out;
}

/// The same values behind another one: data() + 1 of it is aligned to one value only.
Array moved(const Array& values) {
  Array out(values.dtype(), values.size() + 1);
  for (int64_t i = 0; i < values.size(); ++i) out.set(i + 1, values[i]);
  return out;
}
Array without_first(const Array& values) {
  Array out(values.dtype(), values.size() - 1);
  for (int64_t i = 0; i < out.size(); ++i) out.set(i, values[i + 1]);
  return out;
}

UnfoldArgs unfold_args(const Grid& g, const void* pixels, DType pixel_dtype, void* out, DType dtype) {
  UnfoldArgs a{.pixels = pixels, .pixel_dtype = pixel_dtype, .out = out, .dtype = dtype, .batch = g.batch, .height = g.height(), .width = g.width(),
               .patch = g.patch, .mean = {}, .std = {}};
  std::copy_n(kMean, 3, a.mean);
  std::copy_n(kStd, 3, a.std);
  return a;
}

FoldArgs fold_args(const Grid& g, const float* patches, int64_t first, int64_t rows, void* pixels, DType dtype) {
  FoldArgs a{.patches = patches, .pixels = pixels, .pixel_dtype = dtype, .first = first, .rows = rows, .height = g.height(), .width = g.width(),
             .patch = g.patch, .mean = {}, .std = {}};
  std::copy_n(kMean, 3, a.mean);
  std::copy_n(kStd, 3, a.std);
  return a;
}

Array unfold_on_cpu(const Grid& g, const Array& pixels, DType dtype) {
  Array out(dtype, g.count());
  cpu::kernels().unfold(unfold_args(g, pixels.data(), pixels.dtype(), out.data(), dtype));
  return out;
}

void check_unfold(const Grid& g, DType from, DType to) {
  const Array pixels = random_pixels(g, from), want = unfold_on_cpu(g, pixels, to);
  // normalised with a fused multiply-add here, with one on the CPU where it has any
  const double tolerance = from == to ? 0 : to == DType::Float32 ? 1e-6 : 1e-2;
  const std::string name = std::string("unfold ") + name_of(from) + " to " + name_of(to) + ", " + g.text();
  const DeviceArray in(pixels), out(to, g.count());
  gpu().unfold(unfold_args(g, in.data(), from, out.data(), to));
  check_close(out.host(), want, tolerance, name);
  const DeviceArray odd_in(moved(pixels)), odd_out(to, g.count() + 1);
  gpu().unfold(unfold_args(g, odd_in.as<char>() + size_of(from), from, odd_out.as<char>() + size_of(to), to));
  check_close(without_first(odd_out.host()), want, tolerance, name + ", misaligned");
}

/// Pixels right of and below the last whole patch are cut off.
void check_cut(DType from, int64_t below, int64_t right) {
  const Grid g{2, 2, 16, 14};
  const int64_t height = g.height() + below, width = g.width() + right, values = g.batch * 3 * height * width;
  Array pixels(from, values), want(DType::Float32, g.count());
  const Array noise(DType::Float32, normal(values, 12));
  for (int64_t i = 0; i < values; ++i) pixels.set(i, from == DType::UInt8 ? static_cast<double>(i * 7 % 256) : noise[i]);
  const DeviceArray in(pixels), out(DType::Float32, g.count());
  auto args = [&](const void* source, void* to) {
    UnfoldArgs a = unfold_args(g, source, from, to, DType::Float32);
    a.height = height, a.width = width;
    return a;
  };
  cpu::kernels().unfold(args(pixels.data(), want.data()));
  gpu().unfold(args(in.data(), out.data()));
  check_close(out.host(), want, from == DType::Float32 ? 0 : 1e-6, std::string("unfold cuts what is over, ") + name_of(from));
}

/// Rows [first, first + rows) of patch vectors that hold everything a network may come up with.
void check_fold(const Grid& g, DType dtype, int64_t first, int64_t rows) {
  Array patches(DType::Float32, normal(rows * g.size(), 5, 2));
  for (int64_t i = 0; i < patches.size(); i += 50) patches.set(i, i % 200 == 0 ? 1e4 : i % 200 == 50 ? -1e4 : i % 200 == 100 ? INFINITY : NAN);
  const Array want(dtype, g.count(), 99);
  const DeviceArray in(patches), out(want);
  cpu::kernels().fold(fold_args(g, patches.floats(), first, rows, want.data(), dtype));
  gpu().fold(fold_args(g, in.as<float>(), first, rows, out.data(), dtype));
  const Array got = out.host();
  int64_t wrong = 0, apart = 0;  // bytes may differ by one where a value lies between two
  for (int64_t i = 0; i < got.size(); ++i) {
    if (dtype == DType::UInt8 ? std::abs(got[i] - want[i]) > 1 : std::memcmp(got.floats() + i, want.floats() + i, sizeof(float)) != 0) ++wrong;
    if (got[i] != want[i] && !std::isnan(got[i])) ++apart;
  }
  check(wrong == 0 && apart <= got.size() / 1000,
        std::string("fold to ") + name_of(dtype) + ", " + g.text() + ", rows " + std::to_string(first) + " to " + std::to_string(first + rows),
        std::to_string(wrong) + " wrong, " + std::to_string(apart) + " rounded another way");
}

void check_round_trip(const Grid& g, DType dtype) {
  const Array pixels = random_pixels(g, dtype);
  const DeviceArray in(pixels), patches(DType::Float32, g.count()), out(dtype, g.count());
  gpu().unfold(unfold_args(g, in.data(), dtype, patches.data(), DType::Float32));
  gpu().fold(fold_args(g, patches.as<float>(), 0, g.patches(), out.data(), dtype));
  check(out.host() == pixels, std::string("fold undoes unfold of ") + name_of(dtype) + ", " + g.text());
}

void check_assemble(DType dtype, int64_t prefix_count, bool with_position, int64_t width) {
  const int64_t batch = 3, n = 7, tokens = prefix_count + n;
  const Array x(dtype, normal(batch * n * width, 1)), prefix(DType::Float32, normal(prefix_count * width, 2)), position(DType::Float32, normal(n * width, 3));
  const Array want(dtype, batch * tokens * width);
  const DeviceArray on_x(x), on_prefix(prefix), on_position(position), out(dtype, want.size());
  auto args = [&](const void* in, void* to, const float* p, const float* q) {
    return AssembleArgs{.patches = in, .out = to, .dtype = dtype, .batch = batch, .patch_count = n, .prefix_count = prefix_count, .width = width,
                        .prefix = prefix_count ? p : nullptr, .position = with_position ? q : nullptr};
  };
  cpu::kernels().assemble(args(x.data(), want.data(), prefix.floats(), position.floats()));
  gpu().assemble(args(on_x.data(), out.data(), on_prefix.as<float>(), on_position.as<float>()));
  check_close(out.host(), want, 0, std::string("assemble ") + name_of(dtype) + ", " + std::to_string(prefix_count) + " prefix tokens, " +
                                       (with_position ? "positions" : "no positions") + ", width " + std::to_string(width));
}

struct Resize {
  int64_t in_rows, in_cols, out_rows, out_cols, width;
  bool antialias;
};

void check_resize(const Resize& r) {
  const int64_t in = r.in_rows * r.in_cols * r.width, out = r.out_rows * r.out_cols * r.width;
  const std::string name = std::to_string(r.in_rows) + " x " + std::to_string(r.in_cols) + " to " + std::to_string(r.out_rows) + " x " +
                           std::to_string(r.out_cols) + ", width " + std::to_string(r.width) + (r.antialias ? ", antialiased" : "");
  auto compare = [&](void (*const Kernels::*kernel)(const ResizeTableArgs&), int64_t from, int64_t to, const std::string& what) {
    const Array x(DType::Float32, normal(from, 4)), want(DType::Float32, to);
    const DeviceArray on_x(x), got(DType::Float32, to);
    auto args = [&](const float* a, float* b) { return ResizeTableArgs{a, b, r.in_rows, r.in_cols, r.out_rows, r.out_cols, r.width, r.antialias}; };
    (cpu::kernels().*kernel)(args(x.floats(), want.floats()));
    (gpu().*kernel)(args(on_x.as<float>(), got.as<float>()));
    check_close(got.host(), want, 1e-5, what + name);
  };
  compare(&Kernels::resize_table, in, out, "resize ");
  compare(&Kernels::resize_table_backward, out, in, "resize backward ");
}

void bench_pixels(DType dtype, const Grid& g) {
  const DeviceArray pixels(DType::UInt8, g.count()), patches(dtype, g.count());
  const double n = static_cast<double>(g.count());
  time_gpu("unfold uint8, " + g.text(), {.flops = 0, .bytes = n * static_cast<double>(1 + size_of(dtype))}, dtype,
           [&] { gpu().unfold(unfold_args(g, pixels.data(), DType::UInt8, patches.data(), dtype)); });
}

void bench_fold(const Grid& g) {
  const DeviceArray patches = DeviceArray::normal(DType::Float32, g.count()), pixels(DType::UInt8, g.count());
  time_gpu("fold uint8, " + g.text(), {.flops = 0, .bytes = 5 * static_cast<double>(g.count())}, DType::Float32,
           [&] { gpu().fold(fold_args(g, patches.as<float>(), 0, g.patches(), pixels.data(), DType::UInt8)); });
}

void bench_assemble(DType dtype, int64_t batch, int64_t n, int64_t prefix_count, int64_t width) {
  const DeviceArray x = DeviceArray::normal(dtype, batch * n * width), prefix = DeviceArray::normal(DType::Float32, prefix_count * width),
                    position = DeviceArray::normal(DType::Float32, n * width), out(dtype, batch * (prefix_count + n) * width);
  time_gpu("assemble " + std::to_string(batch) + "x" + std::to_string(n) + "x" + std::to_string(width),
           {.flops = 0, .bytes = static_cast<double>(x.bytes() + out.bytes() + position.bytes())}, dtype, [&] {
             gpu().assemble({.patches = x.data(), .out = out.data(), .dtype = dtype, .batch = batch, .patch_count = n, .prefix_count = prefix_count,
                             .width = width, .prefix = prefix.as<float>(), .position = position.as<float>()});
           });
}

void bench_resize(int64_t from, int64_t to, int64_t width) {
  const DeviceArray in = DeviceArray::normal(DType::Float32, from * from * width), out(DType::Float32, to * to * width);
  time_gpu("resize table " + std::to_string(from) + " to " + std::to_string(to) + ", width " + std::to_string(width),
           {.flops = 0, .bytes = static_cast<double>(in.bytes() + out.bytes())}, DType::Float32,
           [&] { gpu().resize_table({in.as<float>(), out.as<float>(), from, from, to, to, width, false}); });
}

}  // namespace

void check_patch() {
  for (const Grid& g : kGrids)
    for (const DType pixels : {DType::UInt8, DType::Float32}) {
      for (const DType dtype : kFloats) check_unfold(g, pixels, dtype);
      check_fold(g, pixels, 0, g.patches());
      check_round_trip(g, pixels);
    }
  for (const DType dtype : {DType::UInt8, DType::Float32}) {
    for (const int64_t right : {2, 12}) check_cut(dtype, 5, right);
    check_fold({2, 3, 4, 5}, dtype, 7, 10);
    check_fold({2, 3, 4, 5}, dtype, 6, 1);
    check_fold({2, 3, 4, 5}, dtype, 24, 0);
    check_fold({2, 2, 16, 14}, dtype, 17, 31);
    check_fold({2, 2, 37, 14}, dtype, 30, 60);
  }
  for (const DType dtype : kFloats)
    for (const int64_t width : {1, 7, 24, 136, 1025})
      for (const int64_t prefix : {0, 5})
        for (const bool position : {false, true}) check_assemble(dtype, prefix, position, width);
  for (const bool antialias : {false, true})
    for (const Resize& r : {Resize{1, 1, 3, 2, 1, false}, {7, 5, 3, 4, 7, false}, {16, 16, 7, 17, 33, false}, {3, 4, 17, 9, 65, false}, {5, 5, 5, 5, 300, false},
                            {33, 2, 4, 1, 3, false}})
      check_resize({r.in_rows, r.in_cols, r.out_rows, r.out_cols, r.width, antialias});
}

void bench_patch() {
  if (emulated()) return bench_pixels(DType::BFloat16, {1, 2, 2, 14});
  for (const DType dtype : kFloats) {
    bench_pixels(dtype, {64, 16, 16, 14});
    bench_pixels(dtype, {64, 16, 16, 16});
    bench_assemble(dtype, 64, 256, 1, 1024);
  }
  bench_pixels(DType::BFloat16, {1, 16, 16, 14});
  bench_fold({64, 16, 16, 14});
  bench_fold({64, 16, 16, 16});
  bench_resize(37, 16, 1024);
}

}  // namespace uniflow::test
