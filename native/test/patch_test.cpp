/// Pixels to patch vectors and back, tokens from patches, and resized position tables, of the instruction set in use
/// (environment variable UNIFLOW_ISA), against their definitions in double precision.
#include "native/ops/patch.h"

#include "native/cpu/kernels.h"
#include "native/test/check.h"

namespace uniflow::test {
namespace {

constexpr ops::Normalisation kImageNet{{0.485f, 0.456f, 0.406f}, {0.229f, 0.224f, 0.225f}};

struct Grid {
  int64_t batch, rows, cols, patch;

  int64_t height() const { return rows * patch; }
  int64_t width() const { return cols * patch; }
  int64_t count() const { return batch * rows * cols * 3 * patch * patch; }
  std::string text() const {
    return std::to_string(batch) + " x " + std::to_string(rows) + " x " + std::to_string(cols) + " patches of " + std::to_string(patch);
  }
  /// Calls body(place in the patch vectors, image, channel, y, x) for every value.
  template <class Body>
  void each(Body&& body) const {
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t c = 0; c < 3; ++c)
        for (int64_t y = 0; y < height(); ++y)
          for (int64_t x = 0; x < width(); ++x) {
            const int64_t n = (b * rows + y / patch) * cols + x / patch;
            body(((n * 3 + c) * patch + y % patch) * patch + x % patch, b, c, y, x);
          }
  }
  int64_t planar(int64_t b, int64_t c, int64_t y, int64_t x) const { return ((b * 3 + c) * height() + y) * width() + x; }
  int64_t packed(int64_t b, int64_t c, int64_t y, int64_t x) const { return ((b * height() + y) * width() + x) * 3 + c; }
};

const Grid kGrids[] = {{1, 1, 1, 1}, {2, 2, 3, 1}, {2, 2, 3, 7}, {1, 3, 1, 14}, {2, 1, 4, 16}, {1, 2, 2, 17}, {0, 2, 3, 7}};

Array random_pixels(const Grid& g, DType dtype) {
  if (dtype == DType::Float32) return Array(dtype, normal(g.count(), 11));
  Array out(dtype, g.count());
  for (int64_t i = 0; i < out.size(); ++i) out.set(i, static_cast<double>((i * 7 + i / 251) % 256));
  return out;
}

Array unfold(const Grid& g, const Array& pixels, DType dtype) {
  Array out(dtype, g.count());
  UnfoldArgs a{.pixels = pixels.data(), .pixel_dtype = pixels.dtype(), .out = out.data(), .dtype = dtype, .batch = g.batch,
                    .height = g.height(), .width = g.width(), .patch = g.patch, .mean = {}, .std = {}};
  std::copy_n(kImageNet.mean.begin(), 3, a.mean);
  std::copy_n(kImageNet.std.begin(), 3, a.std);
  cpu::kernels().unfold(a);
  return out;
}

void fold_rows(const Grid& g, const float* patches, int64_t first, int64_t rows, const Array& pixels) {
  FoldArgs a{.patches = patches, .pixels = pixels.data(), .pixel_dtype = pixels.dtype(), .first = first, .rows = rows,
                  .height = g.height(), .width = g.width(), .patch = g.patch, .mean = {}, .std = {}};
  std::copy_n(kImageNet.mean.begin(), 3, a.mean);
  std::copy_n(kImageNet.std.begin(), 3, a.std);
  cpu::kernels().fold(a);
}

Array fold(const Grid& g, const Array& patches, DType dtype) {
  Array out(dtype, g.count());
  fold_rows(g, patches.floats(), 0, g.batch * g.rows * g.cols, out);
  return out;
}

void test_unfold(const Grid& g, DType from, DType to) {
  const Array pixels = random_pixels(g, from);
  std::vector<double> want(static_cast<size_t>(g.count()));
  g.each([&](int64_t at, int64_t b, int64_t c, int64_t y, int64_t x) {
    const auto channel = static_cast<size_t>(c);
    want[static_cast<size_t>(at)] = from == DType::Float32 ? pixels[g.planar(b, c, y, x)]
                                                           : (pixels[g.packed(b, c, y, x)] / 255 - double{kImageNet.mean[channel]}) / double{kImageNet.std[channel]};
  });
  check_below(worst(unfold(g, pixels, to), want), floor_of(to, 8), std::string("unfold ") + name_of(from) + " to " + name_of(to) + ", " + g.text());
}

void test_fold(const Grid& g) {
  for (DType dtype : {DType::UInt8, DType::Float32}) {
    const Array pixels = random_pixels(g, dtype), patches = unfold(g, pixels, DType::Float32);
    check(fold(g, patches, dtype) == pixels, std::string("fold undoes unfold of ") + name_of(dtype) + ", " + g.text());
  }
}

/// Pixels right of and below the last whole patch are cut off.
void test_cut(DType dtype) {
  const Grid g{2, 2, 3, 7};
  const int64_t height = g.height() + 3, width = g.width() + 5;
  const Array inside = random_pixels(g, dtype);
  Array pixels(dtype, g.batch * 3 * height * width, 200);
  g.each([&](int64_t, int64_t b, int64_t c, int64_t y, int64_t x) {
    if (dtype == DType::UInt8) pixels.set(((b * height + y) * width + x) * 3 + c, inside[g.packed(b, c, y, x)]);
    else pixels.set(((b * 3 + c) * height + y) * width + x, inside[g.planar(b, c, y, x)]);
  });
  const Tensor out = ops::unfold(session(), to_tensor(pixels, dtype == DType::UInt8 ? Shape{2, height, width, 3} : Shape{2, 3, height, width}), g.patch,
                                 kImageNet, DType::Float32);
  check(out.shape() == Shape{2, 6, 147} && to_array(out) == unfold(g, inside, DType::Float32), std::string("unfold cuts what is over, ") + name_of(dtype));
}

/// 8-bit pixels are the denormalised values, rounded to the nearest and clamped.
void test_rounding() {
  const Grid g{1, 16, 16, 4};
  const Array noise(DType::Float32, normal(g.count(), 5, 2));
  Array wide(DType::Float32, g.count());
  for (int64_t i = 0; i < g.count(); ++i) wide.set(i, noise[i] + (i % 100 == 0 ? 1e4 : i % 100 == 1 ? -1e4 : i % 100 == 2 ? INFINITY : i % 100 == 3 ? -INFINITY : 0));
  const Array pixels = fold(g, wide, DType::UInt8);
  int64_t wrong = 0, clamped = 0;
  g.each([&](int64_t at, int64_t b, int64_t c, int64_t y, int64_t x) {
    const auto channel = static_cast<size_t>(c);
    const double exact = 255 * (wide[at] * double{kImageNet.std[channel]} + double{kImageNet.mean[channel]});
    const double inside = std::clamp(exact, 0.0, 255.0);
    clamped += inside != exact;
    wrong += std::abs(pixels[g.packed(b, c, y, x)] - inside) > 0.5 + 1e-4;
  });
  check(wrong == 0 && clamped > g.count() / 10, "fold rounds to the nearest byte and clamps", std::to_string(wrong) + " wrong, " + std::to_string(clamped) + " clamped");
}

/// Some rows of a batch: their pixels and no others.
void test_fold_part() {
  const Grid g{2, 3, 4, 5};
  const int64_t first = 7, rows = 10, width = 3 * g.patch * g.patch;
  for (DType dtype : {DType::UInt8, DType::Float32}) {
    const Array pixels = random_pixels(g, dtype), patches = unfold(g, pixels, DType::Float32);
    const Array part(DType::Float32, std::vector<float>(patches.floats() + first * width, patches.floats() + (first + rows) * width));
    const Array out(dtype, g.count(), 99);
    fold_rows(g, part.floats(), first, rows, out);
    bool ok = true;
    g.each([&](int64_t at, int64_t b, int64_t c, int64_t y, int64_t x) {
      const int64_t i = dtype == DType::UInt8 ? g.packed(b, c, y, x) : g.planar(b, c, y, x), n = at / width;
      ok &= out[i] == (n >= first && n < first + rows ? pixels[i] : 99);
    });
    check(ok, std::string("fold of rows 7 to 16 of 24 writes their pixels only, ") + name_of(dtype));
  }
}

void test_assemble(DType dtype, int64_t prefix_count, bool with_position, int64_t width) {
  const int64_t batch = 2, n = 5, tokens = prefix_count + n;
  const Array x(dtype, normal(batch * n * width, 1)), prefix(DType::Float32, normal(prefix_count * width, 2)), position(DType::Float32, normal(n * width, 3));
  const Array out(dtype, batch * tokens * width);
  cpu::kernels().assemble({.patches = x.data(), .out = out.data(), .dtype = dtype, .batch = batch, .patch_count = n, .prefix_count = prefix_count,
                           .width = width, .prefix = prefix_count ? prefix.floats() : nullptr, .position = with_position ? position.floats() : nullptr});
  std::vector<double> want;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < width; ++i) {
        const int64_t patch = t - prefix_count;
        want.push_back(patch < 0 ? prefix[t * width + i] : x[(b * n + patch) * width + i] + (with_position ? position[patch * width + i] : 0));
      }
  check_below(worst(out, want), floor_of(dtype, 1), std::string("assemble ") + name_of(dtype) + ", " + std::to_string(prefix_count) + " prefix tokens, " +
                                                        (with_position ? "positions" : "no positions") + ", width " + std::to_string(width));
}

/// The weights [out][in] of one dimension, as PyTorch's interpolate(mode="bicubic", align_corners=False) defines them.
std::vector<std::vector<double>> resize_weights(int64_t in, int64_t out, bool antialias) {
  const double a = antialias ? -0.5 : -0.75, scale = static_cast<double>(in) / static_cast<double>(out);
  auto cubic = [&](double x) {
    x = std::abs(x);
    if (x >= 2) return 0.0;
    return x < 1 ? (a + 2) * x * x * x - (a + 3) * x * x + 1 : a * (x * x * x - 5 * x * x + 8 * x - 4);
  };
  std::vector<std::vector<double>> weights(static_cast<size_t>(out), std::vector<double>(static_cast<size_t>(in)));
  for (int64_t o = 0; o < out; ++o) {
    auto& row = weights[static_cast<size_t>(o)];
    const double centre = (static_cast<double>(o) + 0.5) * scale, stretch = antialias ? std::max(scale, 1.0) : 1;
    double total = 0;
    for (auto k = static_cast<int64_t>(std::floor(centre - 2 * stretch)) - 1; k <= static_cast<int64_t>(centre + 2 * stretch) + 1; ++k) {
      const double w = cubic((static_cast<double>(k) + 0.5 - centre) / stretch);
      if (antialias && (k < 0 || k >= in)) continue;  // cut off; the plain filter repeats the border instead
      row[static_cast<size_t>(std::clamp<int64_t>(k, 0, in - 1))] += w;
      total += w;
    }
    for (double& w : row) w /= total;
  }
  return weights;
}

struct Resize {
  int64_t in_rows, in_cols, out_rows, out_cols, width;
};

Array resize(const Resize& r, const Array& table, bool antialias) {
  Array out(DType::Float32, r.out_rows * r.out_cols * r.width);
  cpu::kernels().resize_table({table.floats(), out.floats(), r.in_rows, r.in_cols, r.out_rows, r.out_cols, r.width, antialias});
  return out;
}

void test_resize(const Resize& r, bool antialias) {
  const Array table(DType::Float32, normal(r.in_rows * r.in_cols * r.width, 21));
  const auto rows = resize_weights(r.in_rows, r.out_rows, antialias), cols = resize_weights(r.in_cols, r.out_cols, antialias);
  std::vector<double> want;
  for (const auto& row : rows)
    for (const auto& col : cols)
      for (int64_t i = 0; i < r.width; ++i) {
        double v = 0;
        for (int64_t y = 0; y < r.in_rows; ++y)
          for (int64_t x = 0; x < r.in_cols; ++x)
            v += row[static_cast<size_t>(y)] * col[static_cast<size_t>(x)] * table[(y * r.in_cols + x) * r.width + i];
        want.push_back(v);
      }
  check_below(worst(resize(r, table, antialias), want), 2e-5,  // positions are float32, as PyTorch's: 1e-7 of the grid's size
              std::string(antialias ? "antialiased" : "plain") + " resize " + to_string({r.in_rows, r.in_cols}) + " to " +
                  to_string({r.out_rows, r.out_cols}) + ", width " + std::to_string(r.width));
}

void test_resize_identity(bool antialias) {
  const Resize r{5, 3, 5, 3, 17};
  const Array table(DType::Float32, normal(r.in_rows * r.in_cols * r.width, 22));
  check(resize(r, table, antialias) == table, std::string(antialias ? "antialiased" : "plain") + " resize to the same grid changes no bit");
}

/// [B, T+N, D] = prefix | conv2d(pixels) + position, in one op.
void test_patch_embed() {
  const Grid g{2, 2, 3, 4};
  const int64_t in = 48, width = 10, n = 6;
  const Array pixels = random_pixels(g, DType::UInt8), weight(DType::Float32, normal(width * in, 1, 0.1f)), bias(DType::Float32, normal(width, 2));
  const Array prefix(DType::Float32, normal(width, 3)), position(DType::Float32, normal(n * width, 4)), patches = unfold(g, pixels, DType::Float32);
  const auto s = session();
  const Tensor packed = ops::pack_linear(s, to_tensor(weight, {width, in}), DType::Float32);
  const Tensor out = ops::patch_embed(s, to_tensor(pixels, {2, 8, 12, 3}), packed, to_tensor(bias, {width}), to_tensor(prefix, {1, width}),
                                      to_tensor(position, {n, width}), 4, kImageNet, DType::Float32);
  std::vector<double> want;
  for (int64_t b = 0; b < 2; ++b)
    for (int64_t t = 0; t < 1 + n; ++t)
      for (int64_t i = 0; i < width; ++i) {
        double v = t == 0 ? prefix[i] : bias[i] + position[(t - 1) * width + i];
        for (int64_t k = 0; t > 0 && k < in; ++k) v += patches[(b * n + t - 1) * in + k] * weight[i * in + k];
        want.push_back(v);
      }
  check(out.shape() == Shape{2, 7, 10}, "patch_embed's shape", to_string(out.shape()));
  check_below(worst(to_array(out), want), 1e-5, "patch_embed is unfold, linear, assemble");
}

void test_refusals() {
  const auto s = idle_session();
  const Tensor pixels(DType::UInt8, {1, 8, 12, 3}), patches(DType::Float32, {1, 6, 48}), table(DType::Float32, {6, 8});
  auto unfold = [&](const char* name, const Tensor& t, int64_t patch, DType dtype) { check_refused(name, [&] { ops::unfold(s, t, patch, kImageNet, dtype); }); };
  unfold("a patch larger than the picture", pixels, 9, DType::Float32);
  unfold("a patch size of 0", pixels, 0, DType::Float32);
  unfold("four channels", Tensor(DType::UInt8, {1, 8, 12, 4}), 4, DType::Float32);
  unfold("planar bytes", Tensor(DType::UInt8, {1, 3, 8, 12}), 4, DType::Float32);
  unfold("bfloat16 pixels", Tensor(DType::BFloat16, {1, 3, 8, 12}), 4, DType::Float32);
  unfold("patch vectors of bytes", pixels, 4, DType::UInt8);
  unfold("pictures without a row", Tensor(DType::UInt8, {1, 0, 12, 3}), 4, DType::Float32);
  auto fold = [&](const char* name, const Tensor& t, int64_t rows, int64_t cols, int64_t patch) {
    check_refused(name, [&] { ops::fold(s, t, rows, cols, patch, kImageNet, DType::UInt8); });
  };
  fold("another number of patches than rows times cols", patches, 2, 2, 4);
  fold("a negative number of rows and of columns", patches, -2, -3, 4);
  fold("a negative number of rows", patches, -1, 3, 4);
  fold("patch vectors of another size", patches, 2, 3, 5);
  fold("bfloat16 patch vectors", Tensor(DType::BFloat16, {1, 6, 48}), 2, 3, 4);
  check_refused("a prefix that is a scalar", [&] { ops::assemble(s, patches, Tensor(DType::Float32, {}), {}); });
  check_refused("a prefix of another width", [&] { ops::assemble(s, patches, Tensor(DType::Float32, {1, 47}), {}); });
  check_refused("positions for other tokens", [&] { ops::assemble(s, patches, {}, Tensor(DType::Float32, {5, 48})); });
  check_refused("bfloat16 positions", [&] { ops::assemble(s, patches, {}, Tensor(DType::BFloat16, {6, 48})); });
  check_refused("a table of another grid", [&] { ops::resize_table(s, table, 2, 4, 3, 3, false); });
  check_refused("a grid without rows", [&] { ops::resize_table(s, table, 2, 3, 0, 3, false); });
}

}  // namespace
}  // namespace uniflow::test

int main() {
  using namespace uniflow;
  using namespace uniflow::test;
  std::printf("patch, instruction set %s\n", cpu::kernels().name);
  for (const Grid& g : kGrids) {
    for (DType from : {DType::UInt8, DType::Float32})
      for (DType to : {DType::Float32, DType::BFloat16}) test_unfold(g, from, to);
    test_fold(g);
  }
  for (DType dtype : {DType::UInt8, DType::Float32}) test_cut(dtype);
  test_rounding();
  test_fold_part();
  for (DType dtype : {DType::Float32, DType::BFloat16})
    for (int64_t prefix : {0, 1, 5})
      for (bool position : {false, true})
        for (int64_t width : {1, 17, 1025}) test_assemble(dtype, prefix, position, width);
  for (bool antialias : {false, true}) {
    for (const Resize& r : {Resize{4, 6, 7, 3, 17}, {16, 16, 14, 20, 48}, {1, 1, 3, 2, 7}, {37, 37, 16, 16, 1}, {3, 5, 1, 1, 7}, {32, 8, 5, 31, 33}, {2, 3, 40, 64, 1}})
      test_resize(r, antialias);
    test_resize_identity(antialias);
  }
  test_patch_embed();
  test_refusals();
  return finish();
}
