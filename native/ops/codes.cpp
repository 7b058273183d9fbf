#include "native/ops/codes.h"

#include <cmath>

#include "native/ops/check.h"

namespace uniflow::ops {
namespace {

/// The bound exceeds the outermost digits by a little, so that rounding reaches them.
constexpr double kMargin = 1e-3;

Level level_of(uint32_t level, int64_t radix) {
  const double range = (level - 1) * (1 + kMargin) / 2, offset = level % 2 ? 0 : 0.5;
  return {static_cast<int32_t>(level), static_cast<int32_t>(level / 2), static_cast<int32_t>(radix), static_cast<float>(std::atanh(offset / range)),
          static_cast<float>(range), static_cast<float>(offset)};
}

void check_latents(const Tensor& x, const char* name, const Levels& levels) {
  if (!x || x.packing() || x.rank() < 1 || x.dim(-1) % levels.count)
    reject(name, "a tensor [..., Z], Z a multiple of " + std::to_string(levels.count), describe(x));
  check_floating(x, name);
}

/// The shape with another last dimension.
Shape with_last(Shape shape, int64_t n) {
  shape.back() = n;
  return shape;
}

}  // namespace

Levels levels_of(const std::vector<uint32_t>& levels) {
  if (levels.empty() || levels.size() > kMostLevelChannels)
    reject("levels", "1 to " + std::to_string(kMostLevelChannels) + " channels", std::to_string(levels.size()));
  Levels out{static_cast<int32_t>(levels.size()), 1, {}};
  int64_t codes = 1;
  for (size_t i = 0; i < levels.size(); ++i) {
    if (levels[i] < 2 || levels[i] > kMostLevels) reject("levels", "2 to " + std::to_string(kMostLevels) + " a channel", std::to_string(levels[i]));
    out.channel[i] = level_of(levels[i], codes);
    codes *= levels[i];
    if (codes > kMostCodes) reject("levels", "a product of at most " + std::to_string(kMostCodes), std::to_string(codes));
  }
  out.codes = static_cast<int32_t>(codes);
  return out;
}

Tensor fsq(const SessionRef& session, const Tensor& x, const std::vector<uint32_t>& levels) {
  const Levels l = levels_of(levels);
  check_latents(x, "x", l);
  Tensor out(x.device(), x.dtype(), x.shape());
  enqueue(session, {"fsq", {x}, {out}, [=](const Run& run) { run.kernels.fsq(l, x.data(), out.data(), x.dtype(), x.size()); }});
  return out;
}

Tensor fsq_backward(const SessionRef& session, const Tensor& x, const Tensor& d_out, const std::vector<uint32_t>& levels) {
  const Levels l = levels_of(levels);
  check_latents(x, "x", l);
  check_shape(d_out, "dOut", x.shape());
  check_dtype(d_out, "dOut", {x.dtype()});
  Tensor d_x(x.device(), x.dtype(), x.shape());
  enqueue(session, {"fsqBackward", {x, d_out}, {d_x}, [=](const Run& run) {
    run.kernels.fsq_backward(l, x.data(), d_out.data(), d_x.data(), x.dtype(), x.size());
  }});
  return d_x;
}

Tensor latents_to_codes(const SessionRef& session, const Tensor& latents, const std::vector<uint32_t>& levels) {
  const Levels l = levels_of(levels);
  check_latents(latents, "latents", l);
  Tensor codes(latents.device(), DType::Int32, with_last(latents.shape(), latents.dim(-1) / l.count));
  enqueue(session, {"latentsToCodes", {latents}, {codes}, [=](const Run& run) {
    run.kernels.latents_to_codes(l, latents.data(), codes.data<int32_t>(), latents.dtype(), codes.size());
  }});
  return codes;
}

Tensor codes_to_latents(const SessionRef& session, const Tensor& codes, const std::vector<uint32_t>& levels) {
  const Levels l = levels_of(levels);
  if (!codes || codes.rank() < 1) reject("codes", "a tensor [..., G]", describe(codes));
  check_dtype(codes, "codes", {DType::Int32});
  Tensor latents(codes.device(), DType::Float32, with_last(codes.shape(), codes.dim(-1) * l.count));
  enqueue(session, {"codesToLatents", {codes}, {latents}, [=](const Run& run) {
    const int64_t bad = run.kernels.codes_to_latents(l, codes.data<int32_t>(), latents.data<float>(), codes.size());
    if (bad) reject("codes", "ids from 0 to " + std::to_string(l.codes - 1), std::to_string(bad) + " of " + std::to_string(codes.size()) + " outside");
  }});
  return latents;
}

}  // namespace uniflow::ops
