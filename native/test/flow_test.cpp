/// The pixel flow against a plain double-precision implementation of its definition: the velocity, the integration over
/// every kind of schedule, guidance and number of patches, the noise, cancellation, and what the ops refuse.
#include "native/ops/flow.h"

#include <chrono>
#include <thread>

#include "native/test/check.h"

namespace uniflow::test {
namespace {

constexpr int64_t kWidth = 24;
constexpr ops::Normalisation kImageNet{{0.485f, 0.456f, 0.406f}, {0.229f, 0.224f, 0.225f}};

std::vector<double> values_of(const Array& x) {
  std::vector<double> out;
  for (int64_t i = 0; i < x.size(); ++i) out.push_back(x[i]);
  return out;
}

/// A linear layer in double precision, and as the head has it.
struct Layer {
  Layer(const SessionRef& s, DType dtype, int64_t out, int64_t in, unsigned seed, float deviation = 1) {
    const Array w(dtype, normal(out * in, seed, deviation / std::sqrt(static_cast<float>(in)))), b(DType::Float32, normal(out, seed + 1, 0.2f));
    weight = values_of(w);
    bias = values_of(b);
    head = {ops::pack_linear(s, to_tensor(w, {out, in}), dtype), to_tensor(b, {out})};
  }
  std::vector<double> operator()(const std::vector<double>& x) const {
    std::vector<double> y = bias;
    for (size_t o = 0; o < y.size(); ++o)
      for (size_t i = 0; i < x.size(); ++i) y[o] += weight[o * x.size() + i] * x[i];
    return y;
  }
  std::vector<double> weight, bias;
  LinearLayer head;
};

std::vector<double> silu(std::vector<double> x) {
  for (double& v : x) v /= 1 + std::exp(-v);
  return x;
}

/// LayerNorm without parameters.
std::vector<double> normalise(std::vector<double> x) {
  double mean = 0, squares = 0;
  for (double v : x) mean += v / static_cast<double>(x.size());
  for (double& v : x) v -= mean, squares += v * v / static_cast<double>(x.size());
  for (double& v : x) v /= std::sqrt(squares + 1e-6);
  return x;
}

/// A head with random weights, and its definition.
class Model {
 public:
  Model(DType dtype, int64_t patch, int64_t blocks) : dtype_(dtype), pixels_(3 * patch * patch), patch_(patch) {
    const auto s = session();
    unsigned seed = 100;
    auto layer = [&](int64_t out, int64_t in, float deviation = 1) { return Layer(s, dtype, out, in, seed += 2, deviation); };
    layers_.push_back(layer(kWidth, 256));
    for (const auto& [out, in] : {std::pair{kWidth, kWidth}, {kWidth, kWidth}, {kWidth, pixels_}, {2 * kWidth, kWidth}, {pixels_, kWidth}}) layers_.push_back(layer(out, in));
    for (int64_t i = 0; i < blocks; ++i) {
      blocks_.push_back({Array(DType::Float32, normal(kWidth, seed += 2, 0.2f, 1)), Array(DType::Float32, normal(kWidth, seed += 2, 0.2f)), layer(kWidth, kWidth),
                         layer(kWidth, kWidth), layer(3 * kWidth, kWidth, 0.5f)});
    }
    head = {layers_[0].head, layers_[1].head, layers_[2].head, layers_[3].head, {}, layers_[4].head, layers_[5].head};
    for (const Block& b : blocks_) head.blocks.push_back({to_tensor(b.weight, {kWidth}), to_tensor(b.bias, {kWidth}), b.fc1.head, b.fc2.head, b.modulation.head});
  }

  /// Velocity of one patch.
  std::vector<double> velocity(const std::vector<double>& x, double t, const std::vector<double>& c) const {
    std::vector<double> waves(256), y = layers_[2](c);
    for (size_t i = 0; i < 128; ++i) {
      const double angle = 1000 * t / std::pow(10000, static_cast<double>(i) / 128);
      waves[i] = std::cos(angle), waves[i + 128] = std::sin(angle);
    }
    const auto time = layers_[1](silu(layers_[0](waves)));
    for (size_t i = 0; i < y.size(); ++i) y[i] += time[i];
    y = silu(y);
    auto h = layers_[3](x);
    auto modulated = [&](std::vector<double> u, const std::vector<double>& m) {
      for (size_t i = 0; i < u.size(); ++i) u[i] = u[i] * (1 + m[kWidth + i]) + m[i];
      return u;
    };
    for (const Block& b : blocks_) {
      const auto m = b.modulation(y);
      auto u = normalise(h);
      for (size_t i = 0; i < u.size(); ++i) u[i] = u[i] * b.weight[static_cast<int64_t>(i)] + b.bias[static_cast<int64_t>(i)];
      const auto branch = b.fc2(silu(b.fc1(modulated(u, m))));
      for (size_t i = 0; i < h.size(); ++i) h[i] += m[2 * kWidth + i] * branch[i];
    }
    return layers_[5](modulated(normalise(h), layers_[4](y)));
  }

  /// One patch from noise to pixels.
  std::vector<double> integrate(std::vector<double> x, const std::vector<double>& c, const ops::FlowOptions& o) const {
    for (size_t k = 0; k < o.schedule.time.size(); ++k) {
      const double t = double{o.schedule.time[k]};
      auto v = velocity(x, t, c);
      if (o.guidance != 1.0f) {
        const auto v0 = velocity(x, t, std::vector<double>(c.size(), 0.0));
        for (size_t i = 0; i < v.size(); ++i) v[i] = v0[i] + double{o.guidance} * (v[i] - v0[i]);
      }
      for (size_t i = 0; i < x.size(); ++i) x[i] += double{o.schedule.step[k]} * v[i];
    }
    return x;
  }

  DType dtype() const { return dtype_; }
  int64_t pixels() const { return pixels_; }
  int64_t patch() const { return patch_; }
  FlowHead head;

 private:
  struct Block {
    Array weight, bias;
    Layer fc1, fc2, modulation;
  };
  DType dtype_;
  int64_t pixels_, patch_;
  std::vector<Layer> layers_;
  std::vector<Block> blocks_;
};

/// time_grid of the reference: 1 - t_k = ((steps - k) / steps)^(1 / power).
ops::FlowSchedule schedule(int steps, double power) {
  ops::FlowSchedule s;
  auto at = [&](int k) { return 1 - std::pow(static_cast<double>(steps - k) / steps, 1 / power); };
  for (int k = 0; k < steps; ++k) {
    s.time.push_back(static_cast<float>(at(k)));
    s.step.push_back(static_cast<float>(at(k + 1) - at(k)));
  }
  return s;
}

std::vector<double> row_of(const Array& x, int64_t row, int64_t width) {
  std::vector<double> out;
  for (int64_t i = 0; i < width; ++i) out.push_back(x[row * width + i]);
  return out;
}

/// Relative L2 error; infinite where a value is not finite.
double distance(const Array& got, const std::vector<double>& want) {
  if (got.size() != static_cast<int64_t>(want.size())) return std::numeric_limits<double>::infinity();
  double squares = 0, norm = 0;
  for (int64_t i = 0; i < got.size(); ++i) {
    const double w = want[static_cast<size_t>(i)];
    squares += (got[i] - w) * (got[i] - w), norm += w * w;
  }
  return std::isfinite(squares) ? std::sqrt(squares / std::max(norm, 1e-300)) : std::numeric_limits<double>::infinity();
}

double floor_for(DType dtype) { return dtype == DType::BFloat16 ? 2e-2 : 1e-5; }

struct Run {
  int64_t batch, rows, cols;
  int steps;
  double power;
  float guidance;
};

ops::FlowOptions options(const Model& m, const Run& r) {
  ops::FlowOptions o;
  o.schedule = schedule(r.steps, r.power);
  o.guidance = r.guidance;
  o.rows = r.rows, o.cols = r.cols, o.patch = m.patch();
  o.normalisation = kImageNet;
  o.pixel_dtype = DType::Float32;
  o.seed = 11;
  for (int64_t i = 0; i < r.batch; ++i) o.ids.push_back(static_cast<uint32_t>(i * 3 + 1));
  return o;
}

Tensor condition_of(const Model& m, const Run& r) { return to_tensor(m.dtype(), {r.batch, r.rows * r.cols, kWidth}, normal(r.batch * r.rows * r.cols * kWidth, 31)); }

void test_integrate(const Model& m, const Run& r) {
  const int64_t n = r.rows * r.cols, p = m.patch(), height = r.rows * p, width = r.cols * p;
  const Tensor condition = condition_of(m, r);
  ops::FlowOptions o = options(m, r);
  const Array noise(DType::Float32, normal(r.batch * n * m.pixels(), 32)), c = to_array(condition);
  o.noise = to_tensor(noise, {r.batch, n, m.pixels()});
  std::vector<double> planar(static_cast<size_t>(noise.size())), packed(planar.size());
  for (int64_t row = 0; row < r.batch * n; ++row) {
    const auto x = m.integrate(row_of(noise, row, m.pixels()), row_of(c, row, kWidth), o);
    const int64_t b = row / n, top = row % n / r.cols * p, left = row % n % r.cols * p;
    for (int64_t i = 0; i < m.pixels(); ++i) {
      const int64_t channel = i / (p * p), y = top + i / p % p, column = left + i % p;
      const auto k = static_cast<size_t>(channel);
      planar[static_cast<size_t>(((b * 3 + channel) * height + y) * width + column)] = x[static_cast<size_t>(i)];
      packed[static_cast<size_t>(((b * height + y) * width + column) * 3 + channel)] = std::clamp(255 * (x[static_cast<size_t>(i)] * double{kImageNet.std[k]} + double{kImageNet.mean[k]}), 0.0, 255.0);
    }
  }
  const std::string name = std::string(name_of(m.dtype())) + ", " + std::to_string(m.head.blocks.size()) + " blocks, " + to_string({r.batch, r.rows, r.cols}) + " patches, " +
                           std::to_string(r.steps) + " steps, power " + text("%g", r.power) + ", guidance " + text("%g", double{r.guidance});
  const Tensor out = ops::flow_integrate(session(), m.head, condition, o);
  check(out.shape() == Shape{r.batch, 3, height, width}, "shape of " + name, to_string(out.shape()));
  check_below(distance(to_array(out), planar), floor_for(m.dtype()), "pixels of " + name);
  o.pixel_dtype = DType::UInt8;
  const Array bytes = to_array(ops::flow_integrate(session(), m.head, condition, o));
  double worst_byte = 0;
  for (int64_t i = 0; i < bytes.size(); ++i) worst_byte = std::max(worst_byte, std::abs(bytes[i] - packed[static_cast<size_t>(i)]));
  check_below(worst_byte, m.dtype() == DType::BFloat16 ? 24 : 0.51, "bytes of " + name);
}

void test_velocity(const Model& m, int64_t rows) {
  const Array x(DType::Float32, normal(rows * m.pixels(), 41)), c(m.dtype(), normal(rows * kWidth, 42));
  Array t(DType::Float32, rows);
  for (int64_t i = 0; i < rows; ++i) t.set(i, static_cast<double>(i * 37 % 101) / 100);
  const Tensor out = ops::flow_velocity(session(), m.head, to_tensor(x, {rows, m.pixels()}), to_tensor(t, {rows}), to_tensor(c, {rows, kWidth}));
  std::vector<double> want;
  for (int64_t row = 0; row < rows; ++row)
    for (double v : m.velocity(row_of(x, row, m.pixels()), t[row], row_of(c, row, kWidth))) want.push_back(v);
  check_below(distance(to_array(out), want), floor_for(m.dtype()),
              std::string("velocity, ") + name_of(m.dtype()) + ", " + std::to_string(m.head.blocks.size()) + " blocks, " + std::to_string(rows) + " patches at their own times");
}

/// Noise drawn from a seed is ops::noise; an image depends on its id, not on its place.
void test_noise(const Model& m) {
  const Run r{3, 20, 30, 2, 1, 1};  // 1800 rows: groups of 512 that begin and end inside images
  const auto s = session();
  const Tensor condition = condition_of(m, r);
  ops::FlowOptions drawn = options(m, r), given = drawn;
  given.noise = ops::noise(s, drawn.seed, drawn.ids, 600, m.pixels());
  check(to_array(ops::flow_integrate(s, m.head, condition, drawn)) == to_array(ops::flow_integrate(s, m.head, condition, given)), "noise by seed is the noise of ops::noise");

  const Array one = to_array(condition.slice(2, 3));
  Run single = r;
  single.batch = 1;
  ops::FlowOptions alone = options(m, single);
  alone.ids = {drawn.ids[2]};
  const Array batch = to_array(ops::flow_integrate(s, m.head, condition, drawn).slice(2, 3)), image = to_array(ops::flow_integrate(s, m.head, to_tensor(one, {1, 600, kWidth}), alone));
  std::vector<double> want;
  for (int64_t i = 0; i < image.size(); ++i) want.push_back(image[i]);
  check_below(distance(batch, want), 1e-5, "an image's pixels do not depend on its batch");
}

/// Aborts a run of minutes shortly after it began; the stream goes on.
void test_cancel(const Model& m) {
  const auto s = session();
  auto token = std::make_shared<CancelToken>();
  s->set_token(token);
  const Run r{1, 16, 32, 20000, 1, 2};
  std::promise<void> begun;
  Command marker{"marker", {}, {}, [&](const uniflow::Run&) { begun.set_value(); }};
  Device::cpu().stream().enqueue(s, std::move(marker));
  const Tensor out = ops::flow_integrate(s, m.head, condition_of(m, r), options(m, r));
  begun.get_future().wait();
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  const auto start = std::chrono::steady_clock::now();
  token->cancel();
  const auto failure = wait(out);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  check(failure && failure->code == ErrorCode::Aborted && failure->op == "flowIntegrate", "a cancelled run ends with ABORTED", failure ? failure->what() : "no failure");
  check_below(seconds, 5, "and ends at once, in seconds");
  s->set_token(std::make_shared<CancelToken>());
  test_integrate(m, {1, 1, 1, 1, 1, 1});
}

void test_refusals(const Model& m, const Model& other) {
  const auto s = idle_session();
  const Run r{2, 3, 5, 2, 1, 1};
  const Tensor condition(m.dtype(), {2, 15, kWidth});
  auto refused = [&](const char* name, auto change) {
    FlowHead head = m.head;
    ops::FlowOptions o = options(m, r);
    Tensor c = condition;
    change(head, o, c);
    check_refused(name, [&] { ops::flow_integrate(s, head, c, o); });
  };
  using Head = FlowHead&;
  using Options = ops::FlowOptions&;
  check(error_code([&] { ops::flow_integrate(s, m.head, condition, options(m, r)); }) == "nothing", "takes what the following cases are made of");
  refused("another grid than the condition's", [](Head, Options o, Tensor&) { o.rows = 4; });
  refused("a negative grid", [](Head, Options o, Tensor&) { o.rows = -3, o.cols = -5; });
  refused("a negative number of rows", [](Head, Options o, Tensor&) { o.rows = -1, o.cols = 1; });
  refused("another patch size", [](Head, Options o, Tensor&) { o.patch = 4; });
  refused("a negative patch size", [](Head, Options o, Tensor&) { o.patch = -o.patch; });
  refused("no steps", [](Head, Options o, Tensor&) { o.schedule = {}; });
  refused("more times than steps", [](Head, Options o, Tensor&) { o.schedule.time.push_back(1); });
  refused("too few ids", [](Head, Options o, Tensor&) { o.ids.pop_back(); });
  refused("noise of another shape", [&](Head, Options o, Tensor&) { o.noise = Tensor(DType::Float32, {2, 14, m.pixels()}); });
  refused("bfloat16 noise", [&](Head, Options o, Tensor&) { o.noise = Tensor(DType::BFloat16, {2, 15, m.pixels()}); });
  refused("pixels as int32", [](Head, Options o, Tensor&) { o.pixel_dtype = DType::Int32; });
  refused("a condition of bytes", [](Head, Options, Tensor& c) { c = Tensor(DType::UInt8, {2, 15, kWidth}); });
  refused("a condition of another width", [&](Head, Options, Tensor& c) { c = Tensor(m.dtype(), {2, 15, kWidth + 1}); });
  refused("a layer without a bias", [](Head h, Options, Tensor&) { h.condition.bias = {}; });
  refused("no output layer", [](Head h, Options, Tensor&) { h.output = {}; });
  refused("an output layer that is a scalar", [](Head h, Options, Tensor&) { h.output.weight = Tensor(DType::Float32, {}); });
  refused("a plain weight of another type", [](Head h, Options, Tensor&) { h.time1.weight = Tensor(DType::UInt8, {kWidth, 256}); });
  refused("a block's norm in bfloat16", [](Head h, Options, Tensor&) { h.blocks[0].norm_weight = Tensor(DType::BFloat16, {kWidth}); });
  refused("a block's norm of another width", [](Head h, Options, Tensor&) { h.blocks[0].norm_bias = Tensor(DType::Float32, {kWidth + 1}); });
  refused("a bfloat16 layer in a float32 head", [&](Head h, Options, Tensor&) { h.blocks[0].fc1 = other.head.blocks[0].fc1; });
  auto velocity = [&](const char* name, Shape x, Shape t) {
    check_refused(name, [&] { ops::flow_velocity(s, m.head, Tensor(DType::Float32, x), Tensor(DType::Float32, t), Tensor(m.dtype(), {7, kWidth})); });
  };
  velocity("patches of another width", {7, m.pixels() + 1}, {7});
  velocity("a time for all", {7, m.pixels()}, {1});
}

}  // namespace
}  // namespace uniflow::test

int main() {
  using namespace uniflow;
  using namespace uniflow::test;
  for (DType dtype : {DType::Float32, DType::BFloat16}) {
    for (int64_t blocks : {0, 1, 2, 3}) {
      const Model m(dtype, 2, blocks);
      for (int64_t rows : {0, 1, 7, 17, 1025}) test_velocity(m, rows);
      test_integrate(m, {2, 3, 5, 2, 1, 1.5f});
    }
    const Model m(dtype, 2, 3), odd(dtype, 3, 2);
    for (int steps : {1, 2, 3, 4, 5})
      for (double power : {1.0, 2.0, 3.0}) test_integrate(m, {1, 7, 1, steps, power, steps % 2 ? 1.0f : 0.5f});
    for (float guidance : {1.0f, 0.0f, 2.5f})
      for (const auto& [batch, rows, cols] : {std::tuple<int64_t, int64_t, int64_t>{1, 1, 1}, {1, 1, 17}, {1, 25, 41}, {3, 9, 19}, {2, 16, 16}, {0, 2, 2}})
        test_integrate(odd, {batch, rows, cols, 2, 2, guidance});
    test_noise(m);
    test_cancel(m);
  }
  test_refusals(Model(DType::Float32, 2, 1), Model(DType::BFloat16, 2, 1));
  return finish();
}
