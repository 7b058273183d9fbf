/// Tests of native/image/resample: against a slow reference written from the definition, against what Pillow gave
/// for pictures made by formula, and of what a crop may not change.
#include "native/image/resample.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "native/core/error.h"

namespace {

using uniflow::center_crop;
using uniflow::Filter;
using uniflow::ImageView;
using uniflow::resize;
using uniflow::shortest_edge_crop;
using Bytes = std::vector<uint8_t>;

int passed = 0, failed = 0;

void report(bool ok, const std::string& name) {
  std::printf("%s %s\n", ok ? "ok  " : "FAIL", name.c_str());
  ++(ok ? passed : failed);
}

const char* name_of(Filter filter) {
  switch (filter) {
    case Filter::Box: return "box";
    case Filter::Bilinear: return "bilinear";
    case Filter::Bicubic: return "bicubic";
    case Filter::Lanczos: return "lanczos";
  }
  return "?";
}

std::string text(int width, int height) { return std::to_string(width) + "x" + std::to_string(height); }

struct Picture {
  int width, height;
  Bytes pixels = Bytes(size_t{3} * static_cast<size_t>(width) * static_cast<size_t>(height));

  uint8_t& at(int x, int y, int c) { return pixels[(static_cast<size_t>(y) * width + x) * 3 + c]; }
  ImageView view() const { return ImageView::packed(pixels.data(), width, height); }
};

/// Noise-like curves with squares of pure black and white in between, which make the filters overshoot.
Picture synthetic(int width, int height) {
  Picture p{width, height};
  for (int y = 0; y < height; ++y) {
    for (int x = 0; x < width; ++x) {
      for (int c = 0; c < 3; ++c) {
        const auto v = static_cast<uint32_t>(x * x * 3 + y * y * 5 + x * y * (c + 1) + c * 85);
        const bool pure = (x / 16 + y / 16) % 3 == 0;
        p.at(x, y, c) = static_cast<uint8_t>(pure ? (v & 64 ? 255 : 0) : v);
      }
    }
  }
  return p;
}

uint64_t hash_of(const Bytes& bytes) {
  uint64_t h = 14695981039346656037ull;  // FNV-1a
  for (const uint8_t b : bytes) h = (h ^ b) * 1099511628211ull;
  return h;
}

// ---- The reference: every output from every input, by the definition of the filters.

double kernel(Filter filter, double x) {
  const double pi = std::acos(-1.0), t = std::abs(x);
  switch (filter) {
    case Filter::Box: return x > -0.5 && x <= 0.5 ? 1 : 0;
    case Filter::Bilinear: return t < 1 ? 1 - t : 0;
    case Filter::Bicubic:
      return t < 1 ? 1.5 * t * t * t - 2.5 * t * t + 1 : t < 2 ? -0.5 * t * t * t + 2.5 * t * t - 4 * t + 2 : 0;
    case Filter::Lanczos:
      return t == 0 ? 1 : t < 3 ? 3 * std::sin(pi * t) * std::sin(pi * t / 3) / (pi * pi * t * t) : 0;
  }
  return 0;
}

/// Weights in units of 2^-22 of all inputs for output i.
std::vector<int64_t> weights_of(Filter filter, int i, int in_size, int out_size) {
  const double scale = static_cast<double>(in_size) / out_size, shrink = 1 / std::max(1.0, scale);
  const double center = (i + 0.5) * scale;
  std::vector<double> w(static_cast<size_t>(in_size));
  double total = 0;
  // In Pillow's order: where a box ends in the middle of a pixel, rounding decides who gets the pixel.
  for (int x = 0; x < in_size; ++x) total += w[x] = kernel(filter, (x - center + 0.5) * shrink);
  std::vector<int64_t> fixed;
  for (const double v : w) fixed.push_back(std::llround(v / total * (1 << 22)));
  return fixed;
}

/// One pass along the rows; the other pass is the same on the transposed picture.
Picture pass_reference(Picture in, int out_width, Filter filter) {
  Picture out{out_width, in.height};
  for (int i = 0; i < out_width; ++i) {
    const std::vector<int64_t> w = weights_of(filter, i, in.width, out_width);
    for (int y = 0; y < in.height; ++y) {
      for (int c = 0; c < 3; ++c) {
        int64_t sum = 1 << 21;
        for (int x = 0; x < in.width; ++x) sum += w[x] * in.at(x, y, c);
        out.at(i, y, c) = static_cast<uint8_t>(std::min<int64_t>(255, std::max<int64_t>(0, sum >> 22)));
      }
    }
  }
  return out;
}

Picture transposed(Picture in) {
  Picture out{in.height, in.width};
  for (int y = 0; y < in.height; ++y) {
    for (int x = 0; x < in.width; ++x) {
      for (int c = 0; c < 3; ++c) out.at(y, x, c) = in.at(x, y, c);
    }
  }
  return out;
}

Picture reference(const Picture& in, int width, int height, Filter filter) {
  return transposed(pass_reference(transposed(pass_reference(in, width, filter)), height, filter));
}

// ---- What is tested

/// Runs one of the functions with guard bytes behind its output.
Bytes run(int width, int height, const std::function<void(uint8_t*)>& function) {
  const size_t size = size_t{3} * static_cast<size_t>(width) * static_cast<size_t>(height);
  Bytes out(size + 64, 0xA5);
  function(out.data());
  for (size_t i = size; i < out.size(); ++i) {
    if (out[i] != 0xA5) report(false, "wrote past the end of " + text(width, height));
  }
  out.resize(size);
  return out;
}

Picture resized(const Picture& in, int width, int height, Filter filter) {
  const auto fill = [&](uint8_t* out) { resize(in.view(), out, width, height, filter); };
  return {width, height, run(width, height, fill)};
}

Bytes center_cropped(const ImageView& in, int width, int height) {
  return run(width, height, [&](uint8_t* out) { center_crop(in, out, width, height); });
}

Bytes edge_cropped(const ImageView& in, int width, int height, int edge, Filter filter) {
  return run(width, height, [&](uint8_t* out) { shortest_edge_crop(in, out, width, height, edge, filter); });
}

constexpr Filter kFilters[] = {Filter::Box, Filter::Bilinear, Filter::Bicubic, Filter::Lanczos};

void test_against_reference() {
  const int cases[][4] = {{1, 1, 1, 1},       {1, 1, 7, 5},       {1, 7, 9, 3},     {17, 3, 5, 11},
                          {5, 9, 64, 2},      {40, 30, 40, 17},   {40, 30, 23, 30}, {40, 30, 20, 15},
                          {43, 29, 128, 87},  {43, 29, 21, 14},   {31, 47, 15, 23}, {301, 75, 150, 37},
                          {200, 133, 61, 41}, {1025, 733, 64, 9}};
  for (const auto& [in_width, in_height, width, height] : cases) {
    const Picture in = synthetic(in_width, in_height);
    for (const Filter filter : kFilters) {
      report(resized(in, width, height, filter).pixels == reference(in, width, height, filter).pixels,
             "reference: " + text(in_width, in_height) + " to " + text(width, height) + " " + name_of(filter));
    }
  }
}

void test_against_pillow() {
  struct Case {
    int in_width, in_height, width, height;
    Filter filter;
    uint64_t hash;
  };
  const Case cases[] = {
      {1, 1, 5, 4, Filter::Box, 0x83fbfb74f1fcd589ull},
      {1, 1, 5, 4, Filter::Bilinear, 0x83fbfb74f1fcd589ull},
      {1, 1, 5, 4, Filter::Bicubic, 0x83fbfb74f1fcd589ull},
      {1, 1, 5, 4, Filter::Lanczos, 0x83fbfb74f1fcd589ull},
      {1, 7, 9, 3, Filter::Box, 0xd79c6b2b4e4a3b1cull},
      {1, 7, 9, 3, Filter::Bilinear, 0x5fd611fd5038c957ull},
      {1, 7, 9, 3, Filter::Bicubic, 0x3a494f3ad24c0fd3ull},
      {1, 7, 9, 3, Filter::Lanczos, 0x842d76602ec55f43ull},
      {17, 3, 5, 11, Filter::Box, 0x6ab4da981d8e46fcull},
      {17, 3, 5, 11, Filter::Bilinear, 0xe7223d462bbb3e14ull},
      {17, 3, 5, 11, Filter::Bicubic, 0x7e08f94d9f8d6d09ull},
      {17, 3, 5, 11, Filter::Lanczos, 0x36cc43b2da6fa5baull},
      {41, 31, 20, 15, Filter::Box, 0xab9b781769ea000eull},
      {41, 31, 20, 15, Filter::Bilinear, 0xb426774fa63062a5ull},
      {41, 31, 20, 15, Filter::Bicubic, 0x1d06b62812c8cb03ull},
      {41, 31, 20, 15, Filter::Lanczos, 0xf903eedc8ceb17f4ull},
      {100, 75, 224, 168, Filter::Box, 0x728342e358c08ff0ull},
      {100, 75, 224, 168, Filter::Bilinear, 0x45b9d228057bc9f7ull},
      {100, 75, 224, 168, Filter::Bicubic, 0x5521a5689e3d7cd4ull},
      {100, 75, 224, 168, Filter::Lanczos, 0x3e37d6e5eda72f91ull},
      {257, 129, 128, 64, Filter::Box, 0xbbf6f32aaa0f72dcull},
      {257, 129, 128, 64, Filter::Bilinear, 0xb71f6a7d6c43f4acull},
      {257, 129, 128, 64, Filter::Bicubic, 0x72e60771f6bf23d8ull},
      {257, 129, 128, 64, Filter::Lanczos, 0xd5a0aecded538f56ull},
      {333, 217, 77, 91, Filter::Box, 0x87d13b14a1a78c55ull},
      {333, 217, 77, 91, Filter::Bilinear, 0xa9be27fde8dec981ull},
      {333, 217, 77, 91, Filter::Bicubic, 0xb4a3b9449581c17full},
      {333, 217, 77, 91, Filter::Lanczos, 0xab846a36715ac72bull},
      {3, 400, 8, 50, Filter::Box, 0xc0a13407357c4864ull},
      {3, 400, 8, 50, Filter::Bilinear, 0xb1382b4b9ba85a98ull},
      {3, 400, 8, 50, Filter::Bicubic, 0x5c9b6b94cff3990bull},
      {3, 400, 8, 50, Filter::Lanczos, 0xd5b4e72640a7c17full},
  };
  for (const Case& c : cases) {
    report(hash_of(resized(synthetic(c.in_width, c.in_height), c.width, c.height, c.filter).pixels) == c.hash,
           "Pillow: " + text(c.in_width, c.in_height) + " to " + text(c.width, c.height) + " " + name_of(c.filter));
  }
}

void test_center_crop_against_pillow() {
  struct Case {
    int in_width, in_height, width, height;
    uint64_t hash;
  };
  const Case cases[] = {
      {1100, 733, 224, 224, 0x18658a977cba31cbull},
      {1025, 733, 96, 96, 0xe35bb6b7df370fd5ull},
      {97, 301, 64, 64, 0x99f3387f154dff16ull},
      {30, 20, 48, 48, 0xbc4b6170f917f44cull},
      {512, 256, 64, 64, 0xe3a734be464c3589ull},
      {640, 480, 96, 64, 0x68ecab80f4903129ull},
  };
  for (const Case& c : cases) {
    report(hash_of(center_cropped(synthetic(c.in_width, c.in_height).view(), c.width, c.height)) == c.hash,
           "Pillow: center_crop " + text(c.in_width, c.in_height) + " to " + text(c.width, c.height));
  }
}

void test_shortest_edge_against_pillow() {
  struct Case {
    int in_width, in_height, width, height, edge;
    Filter filter;
    uint64_t hash;
  };
  const Case cases[] = {
      {1100, 733, 224, 224, 224, Filter::Bicubic, 0xca7a3bc37099b16eull},
      {733, 1025, 112, 112, 128, Filter::Bicubic, 0xf045b74f723ec593ull},
      {50, 31, 64, 48, 70, Filter::Bilinear, 0x074932a83517a271ull},
      {300, 200, 64, 64, 64, Filter::Lanczos, 0x345d8f3a59be18eeull},
  };
  for (const Case& c : cases) {
    const Picture in = synthetic(c.in_width, c.in_height);
    report(hash_of(edge_cropped(in.view(), c.width, c.height, c.edge, c.filter)) == c.hash,
           "Pillow: shortest_edge_crop " + text(c.in_width, c.in_height) + " to " + text(c.width, c.height));
  }
}

Bytes cut(const Picture& in, int left, int top, int width, int height) {
  Bytes out;
  for (int y = top; y < top + height; ++y) {
    const auto row = in.pixels.begin() + (static_cast<ptrdiff_t>(y) * in.width + left) * 3;
    out.insert(out.end(), row, row + ptrdiff_t{3} * width);
  }
  return out;
}

/// A crop is the cut-out of the whole resize, for all positions that the crop can take.
void test_crop_is_cut_of_whole() {
  const Picture in = synthetic(211, 97);
  for (const Filter filter : kFilters) {
    const Picture whole = resized(in, 120 * in.width / in.height, 120, filter);
    for (const int size : {1, 2, 33, 64, 119, 120}) {
      report(edge_cropped(in.view(), size, size, 120, filter) ==
                 cut(whole, (whole.width - size) / 2, (whole.height - size) / 2, size, size),
             "crop of " + std::to_string(size) + " is the cut of the whole, " + name_of(filter));
    }
  }
}

/// The chain of halvings computes only what the crop needs; step by step gives the same.
void test_center_crop_is_its_steps() {
  for (const auto& [width, height, size] : {std::array{1025, 733, 64}, {733, 1025, 91}, {64, 64, 64}, {37, 53, 96}}) {
    const Picture in = synthetic(width, height);
    Picture step = in;
    while (std::min(step.width, step.height) >= 2 * size) {
      step = resized(step, step.width / 2, step.height / 2, Filter::Box);
    }
    const double scale = static_cast<double>(size) / std::min(step.width, step.height);
    step = resized(step, static_cast<int>(std::nearbyint(step.width * scale)),
                   static_cast<int>(std::nearbyint(step.height * scale)), Filter::Bicubic);
    report(center_cropped(in.view(), size, size) ==
               cut(step, (step.width - size) / 2, (step.height - size) / 2, size, size),
           "center_crop is its steps, " + text(width, height) + " to " + std::to_string(size));
  }
}

/// Rows may be further apart than the picture is wide, and what lies between them does not matter.
void test_stride() {
  const Picture in = synthetic(150, 90);
  const size_t row = 3 * 150, stride = row + 13;
  Bytes wide(89 * stride + row, 0xEE);
  for (size_t y = 0; y < 90; ++y) std::memcpy(&wide[y * stride], &in.pixels[y * row], row);
  const ImageView view = {wide.data(), 150, 90, stride};
  report(center_cropped(view, 32, 32) == center_cropped(in.view(), 32, 32), "stride, center_crop");
  report(edge_cropped(view, 40, 30, 48, Filter::Lanczos) == edge_cropped(in.view(), 40, 30, 48, Filter::Lanczos),
         "stride, shortest_edge_crop");
}

void test_same_size_is_a_copy() {
  const Picture in = synthetic(61, 47);
  for (const Filter filter : kFilters) {
    report(resized(in, 61, 47, filter).pixels == in.pixels, std::string("same size is a copy, ") + name_of(filter));
  }
}

void test_threads() {
  const Picture in = synthetic(640, 427);
  const Bytes expected = center_cropped(in.view(), 128, 128);
  std::vector<Bytes> got(8);
  std::vector<std::thread> threads;
  for (Bytes& out : got) {
    threads.emplace_back([&] {
      out.resize(expected.size());
      for (int i = 0; i < 10; ++i) center_crop(in.view(), out.data(), 128, 128);
    });
  }
  for (std::thread& thread : threads) thread.join();
  bool same = true;
  for (const Bytes& out : got) same = same && out == expected;
  report(same, "eight threads at once give what one gives");
}

void test_bad_sizes() {
  const Picture in = synthetic(8, 8);
  uint8_t out[3];
  const auto refuses = [](const char* name, const std::function<void()>& call) {
    try {
      call();
      report(false, std::string("refuses ") + name);
    } catch (const uniflow::Error& error) {
      report(error.code == uniflow::ErrorCode::BadInput, std::string("refuses ") + name + ": " + error.what());
    }
  };
  refuses("an empty picture", [&] { center_crop({in.pixels.data(), 0, 8, 0}, out, 1, 1); });
  refuses("an empty target", [&] { resize(in.view(), out, 1, 0, Filter::Box); });
  refuses("a crop larger than the shortest edge", [&] { shortest_edge_crop(in.view(), out, 2, 1, 1, Filter::Box); });
}

}  // namespace

int main() {
  test_against_reference();
  test_against_pillow();
  test_center_crop_against_pillow();
  test_shortest_edge_against_pillow();
  test_crop_is_cut_of_whole();
  test_center_crop_is_its_steps();
  test_stride();
  test_same_size_is_a_copy();
  test_threads();
  test_bad_sizes();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
