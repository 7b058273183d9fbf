/// PSNR and SSIM of pictures made by formula against stored values of scikit-image; and what the definitions imply.
#include "native/ops/quality.h"

#include <functional>

#include "native/test/check.h"

namespace uniflow::test {
namespace {

struct Picture {
  int64_t height, width;
  std::function<int64_t(int64_t y, int64_t x, int64_t c)> value;

  Array bytes() const {
    Array out(DType::UInt8, height * width * 3);
    for (int64_t i = 0; i < out.size(); ++i) out.set(i, static_cast<double>(value(i / 3 / width, i / 3 % width, i % 3)));
    return out;
  }
};

Picture curves(int64_t height, int64_t width, int64_t shift) {
  return {height, width, [shift](int64_t y, int64_t x, int64_t c) { return (x * x * 3 + y * y * 5 + x * y * (c + 1) + c * 85 + shift) % 256; }};
}
Picture ramp(int64_t height, int64_t width) {
  return {height, width, [](int64_t y, int64_t x, int64_t c) { return (x * 3 + y * 2 + c * 40) % 256; }};
}
Picture flat(int64_t height, int64_t width, int64_t value) {
  return {height, width, [value](int64_t, int64_t, int64_t) { return value; }};
}
/// Every value changed by up to `strength`.
Picture noisy(const Picture& p, int64_t strength) {
  return {p.height, p.width, [=](int64_t y, int64_t x, int64_t c) {
            return std::clamp<int64_t>(p.value(y, x, c) + (x * 7 + y * 13 + c * 5 + x * y) % (2 * strength + 1) - strength, 0, 255);
          }};
}
Picture inverse(const Picture& p) {
  return {p.height, p.width, [=](int64_t y, int64_t x, int64_t c) { return 255 - p.value(y, x, c); }};
}

Array quality(const Picture& a, const Picture& b, SsimConvention convention = SsimConvention::Standard) {
  const Shape shape{1, a.height, a.width, 3};
  return to_array(ops::image_quality(session(), to_tensor(a.bytes(), shape), to_tensor(b.bytes(), shape), convention));
}

void test_stored(const char* name, const Picture& a, const Picture& b, double psnr, double standard, double paper) {
  for (const auto& [convention, ssim] : {std::pair{SsimConvention::Standard, standard}, {SsimConvention::Paper, paper}}) {
    const Array q = quality(a, b, convention), reversed = quality(b, a, convention);
    const std::string of = convention == SsimConvention::Paper ? " (paper) of " : " of ";
    check_below(std::abs(q[0] - psnr), 1e-5, "PSNR" + of + name);
    if (std::isnan(ssim)) check(std::isnan(q[1]), "no SSIM" + of + name);
    else check_below(std::abs(q[1] - ssim), 1e-6, "SSIM" + of + name);
    check(std::isnan(ssim) || reversed == q, std::string("the same the other way round, ") + name);
  }
}

void test_equal() {
  for (const Picture& p : {curves(17, 29, 3), flat(11, 11, 0), flat(12, 30, 255)}) {
    const Array q = quality(p, p);
    check(std::isinf(q[0]) && q[0] > 0, "PSNR of a picture with itself is infinite");
    check_below(std::abs(q[1] - 1), 1e-6, "SSIM of a picture with itself is 1");
  }
}

/// Where the picture is smaller than SSIM's window, there is a PSNR only.
void test_small() {
  for (const auto& [height, width] : {std::pair<int64_t, int64_t>{10, 40}, {40, 10}, {1, 1}}) {
    const Array q = quality(flat(height, width, 100), flat(height, width, 110));
    check_below(std::abs(q[0] - 20 * std::log10(25.5)), 1e-5, "PSNR of " + to_string({height, width}));
    check(std::isnan(q[1]), "no SSIM of " + to_string({height, width}));
  }
}

/// A batch is its pictures.
void test_batch() {
  const Picture pictures[] = {curves(13, 20, 0), ramp(13, 20), noisy(ramp(13, 20), 20), flat(13, 20, 9)};
  Array a(DType::UInt8, 3 * 13 * 20 * 3), b(DType::UInt8, a.size());
  std::vector<double> want;
  for (int64_t i = 0; i < 3; ++i) {
    const Picture &p = pictures[i], &q = pictures[i + 1];
    const Array one = quality(p, q);
    want.insert(want.end(), {one[0], one[1]});
    std::memcpy(a.bytes() + i * 780, p.bytes().data(), 780);
    std::memcpy(b.bytes() + i * 780, q.bytes().data(), 780);
  }
  const Tensor out = ops::image_quality(session(), to_tensor(a, {3, 13, 20, 3}), to_tensor(b, {3, 13, 20, 3}));
  check(out.shape() == Shape{3, 2}, "two numbers an image", to_string(out.shape()));
  check_below(worst(to_array(out), want), 0, "a batch gives what its pictures give alone");
  const Tensor none(DType::UInt8, {0, 13, 20, 3});
  check(to_array(ops::image_quality(session(), none, none)).size() == 0, "no pictures, no numbers");
}

void test_refusals() {
  const auto s = idle_session();
  const Tensor a(DType::UInt8, {1, 13, 20, 3});
  auto refused = [&](const char* name, const Tensor& x, const Tensor& y) { check_refused(name, [&] { ops::image_quality(s, x, y); }); };
  refused("pictures of different sizes", a, Tensor(DType::UInt8, {1, 20, 13, 3}));
  refused("different numbers of pictures", a, Tensor(DType::UInt8, {2, 13, 20, 3}));
  refused("grey pictures", Tensor(DType::UInt8, {1, 13, 20, 1}), Tensor(DType::UInt8, {1, 13, 20, 1}));
  refused("float32 pictures", Tensor(DType::Float32, {1, 13, 20, 3}), a);
  refused("nothing to compare with", a, {});
}

}  // namespace
}  // namespace uniflow::test

int main() {
  using namespace uniflow::test;
  test_stored("curves, one level apart", curves(20, 31, 0), curves(20, 31, 1), 22.682791, 0.96813992, 0.97047188);
  test_stored("curves of one window, far apart", curves(11, 11, 0), curves(11, 11, 100), 6.1754024, -0.41793075, -0.40769766);
  test_stored("a ramp with weak noise", ramp(40, 33), noisy(ramp(40, 33), 8), 34.279437, 0.83313637, 0.93345363);
  test_stored("a ramp with strong noise", ramp(64, 64), noisy(ramp(64, 64), 60), 17.873064, 0.19144342, 0.31564425);
  test_stored("black and white", flat(16, 16, 0), flat(16, 16, 255), 0, 9.9990001e-05, 0.00039984006);
  test_stored("a ramp and its inverse", ramp(24, 17), inverse(ramp(24, 17)), 7.1762041, 0.0012192362, 0.27723979);
  test_stored("one window of 7x7", curves(7, 7, 0), curves(7, 7, 3), 38.588379, NAN, 0.999683);
  test_equal();
  test_small();
  test_batch();
  test_refusals();
  return finish();
}
