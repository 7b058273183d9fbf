/// The pixel flow against the CPU's on the same (rounded) weights: velocities, and integrations that are repeated, so that they run
/// kernel by kernel, then recorded, then launched again with other inputs.
#include <chrono>
#include <thread>

#include "native/core/command.h"
#include "native/test/gpu/flow_head.h"
#include "native/test/gpu/timing.h"

namespace uniflow::test {
namespace {

double tolerance(DType dtype) { return dtype == DType::BFloat16 ? 2e-2 : 2e-4; }

struct Size {
  int64_t width, patch, blocks;
  int64_t pixels() const { return 3 * patch * patch; }
};

/// One head in both memories.
struct Model {
  Model(DType dtype, const Size& size, DType stored, unsigned seed = 0)
      : dtype(dtype),
        size(size),
        seed(seed),
        on_gpu(make_flow_head([this](const std::string& name, int64_t n) { return parameter(name, n); }, size.width, size.pixels(), size.blocks, stored)),
        on_cpu(make_on_cpu()) {}
  Model(DType dtype, const Size& size) : Model(dtype, size, dtype) {}

  /// A function of name and seed; deviations that keep activations about as large as they are.
  Array parameter(const std::string& name, int64_t n) const {
    const bool matrix = name.ends_with(".weight") && !name.ends_with("in_ln.weight");
    return {DType::Float32, normal(n, seed + static_cast<unsigned>(std::hash<std::string>()(name)), matrix ? 0.15f : 0.2f, name.ends_with("in_ln.weight") ? 1 : 0)};
  }

  LinearLayer layer(const std::string& name, int64_t out, int64_t in) const {
    const Array weight = parameter(name + ".weight", out * in);
    return {to_tensor(Array(dtype, std::vector<float>(weight.floats(), weight.floats() + weight.size())), {out, in}), to_tensor(parameter(name + ".bias", out), {out})};
  }

  /// With plain weights: all that the CPU's kernels need.
  FlowHead make_on_cpu() const {
    const std::string net = "flow_head.net.";
    const int64_t d = size.width, p = size.pixels();
    FlowHead head{layer(net + "time_embed.mlp.0", d, 256), layer(net + "time_embed.mlp.2", d, d), layer(net + "cond_embed", d, d), layer(net + "input_proj", d, p), {},
                  layer(net + "final_layer.adaLN_modulation.1", 2 * d, d), layer(net + "final_layer.linear", p, d)};
    for (int64_t i = 0; i < size.blocks; ++i) {
      const std::string block = net + "res_blocks." + std::to_string(i);
      head.blocks.push_back({to_tensor(parameter(block + ".in_ln.weight", d), {d}), to_tensor(parameter(block + ".in_ln.bias", d), {d}),
                             layer(block + ".mlp.0", d, d), layer(block + ".mlp.2", d, d), layer(block + ".adaLN_modulation.1", 3 * d, d)});
    }
    return head;
  }

  std::string text() const {
    return std::string(name_of(dtype)) + ", width " + std::to_string(size.width) + ", " + std::to_string(size.blocks) + " blocks, patches of " + std::to_string(size.patch);
  }

  DType dtype;
  Size size;
  unsigned seed;
  FlowHead on_gpu, on_cpu;
};

void check_velocity(const Model& m, int64_t rows) {
  const int64_t p = m.size.pixels();
  const Array x(DType::Float32, normal(rows * p, 1)), condition(m.dtype, normal(rows * m.size.width, 2));
  Array t(DType::Float32, rows);
  for (int64_t i = 0; i < rows; ++i) t.set(i, static_cast<double>(i * 37 % 101) / 100);
  const Tensor want = to_tensor(Array(DType::Float32, rows * p), {rows, p}), got = to_gpu(Array(DType::Float32, rows * p), {rows, p});
  cpu::kernels().flow_velocity(m.on_cpu, to_tensor(x, {rows, p}), to_tensor(t, {rows}), to_tensor(condition, {rows, m.size.width}), want);
  gpu().flow_velocity(m.on_gpu, to_gpu(x, {rows, p}), to_gpu(t, {rows}), to_gpu(condition, {rows, m.size.width}), got);
  check_close(to_host(got), to_array(want), tolerance(m.dtype), "velocity of " + std::to_string(rows) + " patches, " + m.text());
}

struct Case {
  int64_t batch, rows, cols;
  int steps;
  float guidance = 1;
  bool given_noise = false;
  DType pixels = DType::Float32;

  int64_t patches() const { return rows * cols; }
  std::string text() const {
    return std::to_string(batch) + " x " + std::to_string(rows) + " x " + std::to_string(cols) + " patches, " + std::to_string(steps) + " steps, guidance " +
           text_of(guidance) + (given_noise ? ", noise given" : "") + ", to " + name_of(pixels);
  }
  static std::string text_of(float v) { return test::text("%g", double{v}); }
};

/// `turn` changes what comes and goes, and nothing that a recorded graph depends on.
ops::FlowOptions options_of(const Size& size, const Case& c, uint64_t turn) {
  ops::FlowOptions o;
  for (int i = 0; i < c.steps; ++i) {
    o.schedule.time.push_back(static_cast<float>(i) / static_cast<float>(c.steps));
    o.schedule.step.push_back(1.0f / static_cast<float>(c.steps));
  }
  o.guidance = c.guidance;
  o.rows = c.rows, o.cols = c.cols, o.patch = size.patch;
  o.normalisation = {{0.485f, 0.456f, 0.406f}, {0.229f, 0.224f, 0.225f}};
  o.pixel_dtype = c.pixels;
  o.seed = 11 + turn;
  for (int64_t i = 0; i < c.batch; ++i) o.ids.push_back(static_cast<uint32_t>(i * 3 + 1));
  return o;
}

Tensor integrate_on_gpu(const Model& m, const Case& c, const ops::FlowOptions& o, const Array& condition, const CancelToken& token) {
  const int64_t n = 3 * c.batch * c.patches() * m.size.patch * m.size.patch;
  const Tensor pixels = to_gpu(Array(c.pixels, n), {n});
  gpu().flow_integrate(m.on_gpu, to_gpu(condition, {c.batch, c.patches(), m.size.width}), o, pixels, token);
  return pixels;
}

void check_turns(const Model& m, const Case& c, int turns, double tolerated) {
  const Shape shape{c.batch, c.patches(), m.size.width}, noise_shape{c.batch, c.patches(), m.size.pixels()};
  const int64_t n = 3 * c.batch * c.patches() * m.size.patch * m.size.patch;
  for (int turn = 0; turn < turns; ++turn) {
    const Array condition(m.dtype, normal(count(shape), 21 + static_cast<unsigned>(turn))), noise(DType::Float32, normal(count(noise_shape), 31 + static_cast<unsigned>(turn)));
    ops::FlowOptions o = options_of(m.size, c, static_cast<uint64_t>(turn)), on_cpu = o;
    if (c.given_noise) o.noise = to_gpu(noise, noise_shape), on_cpu.noise = to_tensor(noise, noise_shape);
    const Tensor want = to_tensor(Array(c.pixels, n), {n});
    cpu::kernels().flow_integrate(m.on_cpu, to_tensor(condition, shape), on_cpu, want, CancelToken());
    check_close(to_host(integrate_on_gpu(m, c, o, condition, CancelToken())), to_array(want), tolerated > 0 ? tolerated : tolerance(m.dtype),
                c.text() + ", " + m.text() + ", turn " + std::to_string(turn));
  }
}

void check_integrate(const Model& m, const Case& c, int turns = 3, double tolerated = 0) {
  attempt(c.text() + ", " + m.text(), [&] { check_turns(m, c, turns, tolerated); });
}

/// A run of very many steps is aborted soon after it began; and a token that was cancelled before lets nothing begin.
void check_cancel(const Model& m) {
  const Case c{1, 4, 4, 20000};
  const Array condition(m.dtype, normal(c.patches() * m.size.width, 1));
  CancelToken token;
  std::thread canceller([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    token.cancel();
  });
  const std::string code = error_code([&] { integrate_on_gpu(m, c, options_of(m.size, c, 0), condition, token); });
  canceller.join();
  check(code == "ABORTED", "a long integration is aborted", code);
  const Case few{1, 4, 4, 3};
  for (int i = 0; i < 3; ++i) {
    const std::string again = error_code([&] { integrate_on_gpu(m, few, options_of(m.size, few, 0), condition, token); });
    check(again == "ABORTED", "a cancelled integration does not begin", again);
  }
  check_integrate(m, few);
}

void check_timestep_embedding(int64_t count) {
  Array t(DType::Float32, count);
  for (int64_t i = 0; i < count; ++i) t.set(i, static_cast<double>(i) / static_cast<double>(count));
  const Array want(DType::Float32, count * kTimeChannels);
  const DeviceArray in(t), out(DType::Float32, want.size());
  cpu::kernels().timestep_embedding(t.floats(), count, want.floats());
  gpu().timestep_embedding(in.as<float>(), count, out.as<float>());
  check_close(out.host(), want, 1e-6, "time waves of " + std::to_string(count) + " times");
}

/// The official head: width 1024, 12 blocks, patches of 14 x 14. Its 66 M parameters are parts of one block of random numbers: drawing them
/// all would take longer than the benchmark.
FlowHead official_head(const Size& size, DType dtype) {
  static const std::vector<float> numbers = normal(1 << 20, 1, 0.03f);
  auto parameter = [](const std::string&, int64_t n) {
    Array out(DType::Float32, n);
    for (int64_t i = 0; i < n; i += std::ssize(numbers))
      std::memcpy(out.floats() + i, numbers.data(), static_cast<size_t>(std::min(n - i, std::ssize(numbers))) * sizeof(float));
    return out;
  };
  return make_flow_head(parameter, size.width, size.pixels(), size.blocks, dtype);
}

void bench(DType dtype, int64_t images, int steps, float guidance) {
  const Size size = emulated() ? Size{16, 2, 1} : Size{1024, 14, 12};
  const int64_t side = emulated() ? 2 : 16;
  const Case c{images, side, side, steps, guidance, false, DType::UInt8};
  const std::string name = "integrate " + std::to_string(images) + "x" + std::to_string(c.patches()) + "x" + std::to_string(size.width) + ", " +
                           std::to_string(steps) + " steps" + (guidance != 1 ? ", guided" : "");
  if (!row_wanted(name, dtype)) return;
  const FlowHead head = official_head(size, dtype);
  const double d = static_cast<double>(size.width), p = static_cast<double>(size.pixels()), blocks = static_cast<double>(size.blocks);
  const double modulations = (3 * blocks + 2) * d * d, pass = 2 * p * d + 2 * blocks * d * d, rows = static_cast<double>(images * c.patches());
  const double weights = (modulations + pass + 2 * d * d) * static_cast<double>(size_of(dtype));
  const Tensor condition = to_gpu(Array(dtype, normal(images * c.patches() * size.width, 1)), {images, c.patches(), size.width});
  const int64_t n = images * c.patches() * size.pixels();
  const Tensor pixels = to_gpu(Array(DType::UInt8, n), {n});
  const ops::FlowOptions o = options_of(size, c, 0);
  time_gpu(name, {.flops = 2 * rows * (steps * (modulations + (guidance != 1 ? 2 : 1) * pass) + d * d), .bytes = weights}, dtype,
           [&] { gpu().flow_integrate(head, condition, o, pixels, CancelToken()); });
}

}  // namespace

void check_flow() {
  for (const int64_t count : {0, 1, 7, 1025}) check_timestep_embedding(emulated() && count > 7 ? 50 : count);
  for (const DType dtype : {DType::Float32, DType::BFloat16}) {
    for (const int64_t blocks : {0, 1, 2, 3}) {
      const Model m(dtype, {24, 2, blocks});
      for (const int64_t rows : {1, 7, 17}) check_velocity(m, rows);
      check_integrate(m, {2, 3, 5, 2, 1.5f});
    }
    const Model m(dtype, {24, 2, 2}), odd(dtype, {17, 3, 1}), small(dtype, {8, 1, 1});
    check_velocity(odd, 17);
    for (const float guidance : {1.0f, 0.0f, 2.5f}) {
      check_integrate(odd, {3, 3, 7, 2, guidance});
      check_integrate(m, {1, 1, 17, 3, guidance, true, DType::UInt8});
    }
    check_integrate(m, {0, 2, 2, 1}, 1);
    check_integrate(small, {2, 1, 9, 1}, 2);
    check_integrate(small, {1, 1, 8201, 1}, 2);        // two groups, the second a row short
    check_integrate(small, {3, 1, 2901, 1, 2.0f}, 2);  // three
    check_integrate(small, {1, 1, 3, 600}, 2);         // too many steps for a graph
    const Model other(dtype, {8, 1, 1}, dtype, 1);
    for (int turn = 0; turn < 3; ++turn)
      for (const Model* model : {&small, &other}) check_integrate(*model, {2, 1, 9, 1}, 1);
  }
  check_integrate(Model(DType::BFloat16, {32, 4, 2}, DType::Float8), {2, 3, 5, 2, 1.5f}, 3, 0.15);
  check_cancel(Model(DType::Float32, {8, 1, 1}));
}

void bench_flow() {
  if (emulated()) return bench(DType::BFloat16, 1, 2, 1);
  bench(DType::BFloat16, 1, 1, 1);
  bench(DType::BFloat16, 1, 10, 1);
  bench(DType::BFloat16, 64, 1, 1);
  bench(DType::BFloat16, 64, 4, 1);
  bench(DType::BFloat16, 64, 1, 3);
  bench(DType::Float32, 16, 1, 1);
}

}  // namespace uniflow::test
