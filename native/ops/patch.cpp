#include "native/ops/patch.h"

#include <algorithm>
#include <tuple>

#include "native/ops/check.h"

namespace uniflow::ops {
namespace {

struct PixelShape {
  int64_t batch, height, width;
};

PixelShape check_pixels(const Tensor& pixels, int64_t patch) {
  check_positive(patch, "patch");
  if (!pixels || pixels.rank() != 4) reject("pixels", "uint8 [B, H, W, 3] or float32 [B, 3, H, W]", describe(pixels));
  check_dtype(pixels, "pixels", {DType::UInt8, DType::Float32});
  const bool bytes = pixels.dtype() == DType::UInt8;
  const PixelShape s{pixels.dim(0), pixels.dim(bytes ? 1 : 2), pixels.dim(bytes ? 2 : 3)};
  if (pixels.dim(bytes ? 3 : 1) != 3) reject("pixels", bytes ? "[B, H, W, 3]" : "[B, 3, H, W]", describe(pixels));
  if (s.height < patch || s.width < patch) reject("pixels", "height and width of at least the patch size " + std::to_string(patch), describe(pixels));
  return s;
}

}  // namespace

Tensor unfold(const SessionRef& session, const Tensor& pixels, int64_t patch, const Normalisation& n, DType dtype) {
  const PixelShape s = check_pixels(pixels, patch);
  Tensor out(pixels.device(), dtype, {s.batch, (s.height / patch) * (s.width / patch), 3 * patch * patch});
  check_floating(out, "dtype");
  enqueue(session, {"unfold", {pixels}, {out}, [=](const Run& run) {
    UnfoldArgs a{.pixels = pixels.data(), .pixel_dtype = pixels.dtype(), .out = out.data(), .dtype = dtype, .batch = s.batch,
                      .height = s.height, .width = s.width, .patch = patch, .mean = {}, .std = {}};
    std::copy(n.mean.begin(), n.mean.end(), a.mean);
    std::copy(n.std.begin(), n.std.end(), a.std);
    run.kernels.unfold(a);
  }});
  return out;
}

Tensor fold(const SessionRef& session, const Tensor& patches, int64_t rows, int64_t cols, int64_t patch, const Normalisation& n,
            DType pixel_dtype) {
  for (const auto& [n, name] : {std::pair{rows, "rows"}, std::pair{cols, "cols"}, std::pair{patch, "patch"}}) check_positive(n, name);
  check_shape(patches, "patches", {-1, rows * cols, 3 * patch * patch});
  check_dtype(patches, "patches", {DType::Float32});
  const int64_t batch = patches.dim(0), height = rows * patch, width = cols * patch;
  Tensor out(patches.device(), pixel_dtype, pixel_dtype == DType::UInt8 ? Shape{batch, height, width, 3} : Shape{batch, 3, height, width});
  check_dtype(out, "dtype", {DType::UInt8, DType::Float32});
  enqueue(session, {"fold", {patches}, {out}, [=](const Run& run) {
    FoldArgs a{.patches = patches.data<float>(), .pixels = out.data(), .pixel_dtype = pixel_dtype, .first = 0,
                    .rows = batch * rows * cols, .height = height, .width = width, .patch = patch, .mean = {}, .std = {}};
    std::copy(n.mean.begin(), n.mean.end(), a.mean);
    std::copy(n.std.begin(), n.std.end(), a.std);
    run.kernels.fold(a);
  }});
  return out;
}

Tensor patch_embed(const SessionRef& session, const Tensor& pixels, const Tensor& weight, const Tensor& bias, const Tensor& prefix,
                   const Tensor& position, int64_t patch, const Normalisation& normalisation, DType dtype) {
  const Tensor patches = linear(session, unfold(session, pixels, patch, normalisation, dtype), weight, {.bias = bias, .scale = {}, .residual = {}});
  return assemble(session, patches, prefix, position);
}

Tensor assemble(const SessionRef& session, const Tensor& x, const Tensor& prefix, const Tensor& position) {
  check_shape(x, "x", {-1, -1, -1});
  check_floating(x, "x");
  const int64_t batch = x.dim(0), n = x.dim(1), width = x.dim(2);
  for (const auto& [t, name, rows] : {std::tuple{prefix, "prefix", int64_t{-1}}, std::tuple{position, "position", n}}) {
    if (!t) continue;
    check_shape(t, name, {rows, width});
    check_dtype(t, name, {DType::Float32});
  }
  const int64_t extra = prefix ? prefix.dim(0) : 0;
  Tensor out(x.device(), x.dtype(), {batch, extra + n, width});
  enqueue(session, {"assemble", {x, prefix, position}, {out}, [=](const Run& run) {
    run.kernels.assemble({.patches = x.data(), .out = out.data(), .dtype = x.dtype(), .batch = batch, .patch_count = n,
                             .prefix_count = extra, .width = width, .prefix = float_data(prefix), .position = float_data(position)});
  }});
  return out;
}

Tensor resize_table(const SessionRef& session, const Tensor& table, int64_t rows, int64_t cols, int64_t out_rows, int64_t out_cols,
                    bool antialias) {
  check_grid(rows, cols);
  check_grid(out_rows, out_cols);
  check_shape(table, "table", {rows * cols, -1});
  check_dtype(table, "table", {DType::Float32});
  Tensor out(table.device(), DType::Float32, {out_rows * out_cols, table.dim(1)});
  enqueue(session, {"resizeTable", {table}, {out}, [=](const Run& run) {
    run.kernels.resize_table({.in = float_data(table), .out = out.data<float>(), .in_rows = rows, .in_cols = cols,
                                 .out_rows = out_rows, .out_cols = out_cols, .width = table.dim(1), .antialias = antialias});
  }});
  return out;
}

Tensor resize_table_backward(const SessionRef& session, const Tensor& d_out, int64_t rows, int64_t cols, int64_t out_rows, int64_t out_cols,
                             bool antialias) {
  check_grid(rows, cols);
  check_grid(out_rows, out_cols);
  check_shape(d_out, "dOut", {out_rows * out_cols, -1});
  check_dtype(d_out, "dOut", {DType::Float32});
  Tensor out(d_out.device(), DType::Float32, {rows * cols, d_out.dim(1)});
  enqueue(session, {"resizeTableBackward", {d_out}, {out}, [=](const Run& run) {
    run.kernels.resize_table_backward({.in = d_out.data<float>(), .out = out.data<float>(), .in_rows = rows, .in_cols = cols,
                                          .out_rows = out_rows, .out_cols = out_cols, .width = d_out.dim(1), .antialias = antialias});
  }});
  return out;
}

}  // namespace uniflow::ops
