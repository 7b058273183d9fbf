/// Noise and draws: the CPU's words, and normal numbers within what logarithms and sines differ by.
#include "native/test/gpu/gpu.h"

namespace uniflow::test {
namespace {

/// Rows [first, first + rows) of images of `patches` rows.
struct Noise {
  int64_t first, rows, width, patches;
  std::string text() const {
    return "rows " + std::to_string(first) + " to " + std::to_string(first + rows) + " of width " + std::to_string(width) + ", " + std::to_string(patches) +
           " an image";
  }
};

std::vector<uint32_t> ids_of(int64_t images, int64_t first = 0) {
  std::vector<uint32_t> ids;
  for (int64_t i = 0; i < images; ++i) ids.push_back(static_cast<uint32_t>((first + i) * 0x9e3779b9 + 7));
  return ids;
}

constexpr uint64_t kSeed = 0x1234567890abcdef;

void check_noise(const Noise& n, bool misaligned = false) {
  const std::vector<uint32_t> ids = ids_of((n.first + n.rows) / n.patches + 1, n.first);
  const Array want(DType::Float32, n.rows * n.width);
  const DeviceArray out(DType::Float32, want.size() + misaligned);
  auto args = [&](float* to) { return NoiseArgs{to, n.first, n.rows, n.width, n.patches, kSeed, ids.data()}; };
  cpu::kernels().noise(args(want.floats()));
  gpu().noise(args(out.as<float>() + misaligned));
  Array got = out.host();
  if (misaligned) got = Array(DType::Float32, std::vector<float>(got.floats() + 1, got.floats() + got.size()));
  check_close(got, want, 1e-5, "noise, " + n.text() + (misaligned ? ", misaligned" : ""));
}

void check_draw(int64_t images, int64_t patches) {
  const std::vector<uint32_t> ids = ids_of(images);
  for (const auto& [logit_normal, zero] : {std::pair{false, 0.0f}, {true, 0.0f}, {true, 0.5f}}) {
    const Array want(DType::Float32, images * patches);
    const DeviceArray out(DType::Float32, want.size());
    auto args = [&, logit_normal = logit_normal, zero = zero](float* to) { return DrawArgs{to, images, patches, kSeed, ids.data(), logit_normal, -0.5f, 1.25f, zero}; };
    cpu::kernels().draw(args(want.floats()));
    gpu().draw(args(out.as<float>()));
    check_close(out.host(), want, logit_normal ? 1e-5 : 0, std::string(logit_normal ? "logit-normal" : "uniform") + " numbers for " + std::to_string(images) +
                                                               " x " + std::to_string(patches));
  }
}

}  // namespace

void check_random() {
  for (const int64_t width : {1, 2, 3, 4, 5, 7, 12, 129, 588, 1025}) check_noise({0, 17, width, 5});
  check_noise({0, 0, 12, 5});
  check_noise({4, 1, 12, 5});
  check_noise({3, 9, 588, 5});
  check_noise({1000, 25, 12, 1000});
  check_noise({3, 9, 12, 5}, true);
  check_draw(0, 3);
  check_draw(1, 1);
  check_draw(7, 1025);
}

void bench_random() {
  const int64_t rows = emulated() ? 8 : 8192;
  for (const int64_t width : {588, 768}) {
    const DeviceArray out(DType::Float32, rows * width);
    const std::vector<uint32_t> ids = ids_of(rows / 256 + 1);
    time_gpu("noise " + std::to_string(rows) + "x" + std::to_string(width), {.flops = 0, .bytes = static_cast<double>(out.bytes())}, DType::Float32,
             [&] { gpu().noise({out.as<float>(), 0, rows, width, 256, kSeed, ids.data()}); });
  }
}

}  // namespace uniflow::test
