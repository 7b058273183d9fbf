/// PSNR and SSIM.
#include "native/test/gpu/gpu.h"

namespace uniflow::test {
namespace {

/// A smooth picture, and the same with noise of `deviation`.
std::pair<Array, Array> pictures(int64_t images, int64_t height, int64_t width, float deviation) {
  Array a(DType::UInt8, images * height * width * 3), b(DType::UInt8, a.size());
  const std::vector<float> noise = normal(a.size(), 1, deviation);
  for (int64_t i = 0; i < a.size(); ++i) {
    const double x = static_cast<double>(i / 3 % width), y = static_cast<double>(i / 3 / width), v = 128 + 100 * std::sin(0.2 * x + static_cast<double>(i % 3)) * std::cos(0.1 * y);
    a.set(i, std::clamp(v, 0.0, 255.0));
    b.set(i, std::clamp(v + static_cast<double>(noise[static_cast<size_t>(i)]), 0.0, 255.0));
  }
  return {std::move(a), std::move(b)};
}

void check_pictures(int64_t images, int64_t height, int64_t width, float deviation, SsimConvention convention) {
  const auto [a, b] = pictures(images, height, width, deviation);
  const Array want(DType::Float32, images * 2);
  const DeviceArray on_a(a), on_b(b), out(DType::Float32, images * 2);
  cpu::kernels().image_quality(a.bytes(), b.bytes(), want.floats(), images, height, width, convention);
  gpu().image_quality(on_a.as<uint8_t>(), on_b.as<uint8_t>(), out.as<float>(), images, height, width, convention);
  Array got = out.host();
  bool undefined = true;
  for (int64_t i = 0; i < got.size(); ++i)
    if (std::isnan(want[i])) undefined &= std::isnan(got[i]), got.set(i, 0), want.floats()[i] = 0;
  const std::string name = std::to_string(images) + " x " + std::to_string(height) + " x " + std::to_string(width) + ", noise " + text("%g", double{deviation}) + (convention == SsimConvention::Paper ? ", paper" : "");
  check(undefined, "no SSIM where no window fits, " + name);
  check_close(got, want, 1e-6, "PSNR and SSIM of " + name);
}

}  // namespace

void check_quality() {
  for (const auto& [height, width] : {std::pair<int64_t, int64_t>{1, 1}, {10, 40}, {40, 10}, {7, 9}, {11, 11}, {12, 43}, {64, 48}, {27, 75}})
    for (const float deviation : {0.0f, 1.0f, 30.0f})
      for (const auto convention : {SsimConvention::Standard, SsimConvention::Paper}) check_pictures(2, height, width, deviation, convention);
  check_pictures(0, 16, 16, 1, SsimConvention::Standard);
  if (emulated()) return;
  check_pictures(3, 257, 333, 10, SsimConvention::Standard);  // more than one block sums the squares
}

void bench_quality() {
  const int64_t images = emulated() ? 1 : 64, side = emulated() ? 16 : 256;
  const auto [a, b] = pictures(images, side, side, 10);
  const DeviceArray on_a(a), on_b(b), out(DType::Float32, images * 2);
  time_gpu("PSNR and SSIM of " + std::to_string(images) + "x" + std::to_string(side) + "x" + std::to_string(side) + " (in float64)",
           {.flops = 290 * static_cast<double>(a.size()), .bytes = 2 * static_cast<double>(a.size())}, DType::Float32,
           [&] { gpu().image_quality(on_a.as<uint8_t>(), on_b.as<uint8_t>(), out.as<float>(), images, side, side, SsimConvention::Standard); });
}

}  // namespace uniflow::test
