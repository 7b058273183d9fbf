/// AdamW and the global norm on the GPU against the CPU's.
#include <numeric>

#include "native/test/gpu/gpu.h"

namespace uniflow::test {
namespace {

float* floats(void* p) { return static_cast<float*>(p); }

// --- AdamW -------------------------------------------------------------------------------------------------------------

/// A parameter with its state, of either kind of array.
template <class A>
struct Parameter {
  A value, grad, m, v, average, compute;
};

constexpr int kAll = -1;

struct Plan {
  int64_t n, offset;  // elements, and how many lie before them in the memory
  bool average, compute;
  float lr, weight_decay;
  int which = kAll;  // the array that has the offset, in the order of Parameter

  int64_t offset_of(int array) const { return which == kAll || which == array ? offset : 0; }
};

template <class A>
AdamWParameter to_args(const Plan& s, const Parameter<A>& p) {
  return {.parameter = floats(p.value.data()) + s.offset_of(0),
          .grad = floats(p.grad.data()) + s.offset_of(1),
          .m = floats(p.m.data()) + s.offset_of(2),
          .v = floats(p.v.data()) + s.offset_of(3),
          .average = s.average ? floats(p.average.data()) + s.offset_of(4) : nullptr,
          .compute = s.compute ? static_cast<bf16*>(p.compute.data()) + s.offset_of(5) : nullptr,
          .n = s.n,
          .lr = s.lr,
          .weight_decay = s.weight_decay};
}

Parameter<Array> parameter_of(const Plan& s, unsigned seed) {
  const int64_t n = s.n + s.offset;
  Array v(DType::Float32, normal(n, seed + 3));
  for (int64_t i = 0; i < n; ++i) v.set(i, v[i] * v[i]);
  auto some = [&](unsigned which) { return Array(DType::Float32, normal(n, seed + which)); };
  return {some(0), some(1), some(2), std::move(v), some(4), Array(DType::BFloat16, n, 3)};
}

Parameter<DeviceArray> upload(const Parameter<Array>& p) {
  return {DeviceArray(p.value), DeviceArray(p.grad), DeviceArray(p.m), DeviceArray(p.v), DeviceArray(p.average), DeviceArray(p.compute)};
}

/// The device's arrays one after another, in the order of Parameter.
template <class Body>
void each_array(const Parameter<DeviceArray>& got, const Parameter<Array>& want, Body&& body) {
  body(got.value, want.value, "parameter");
  body(got.grad, want.grad, "gradient");
  body(got.m, want.m, "m");
  body(got.v, want.v, "v");
  body(got.average, want.average, "average");
  body(got.compute, want.compute, "bfloat16 copy");
}

struct Step {
  float norm, clip;
};

template <class A>
void step(const Kernels& kernels, const std::vector<Plan>& plans, const std::vector<Parameter<A>>& parameters, const A& norm, float clip) {
  std::vector<AdamWParameter> list;
  for (size_t i = 0; i < plans.size(); ++i) list.push_back(to_args(plans[i], parameters[i]));
  kernels.adamw({.parameters = list.data(),
                 .count = static_cast<int64_t>(list.size()),
                 .norm = floats(norm.data()),
                 .clip = clip,
                 .beta1 = 0.9f,
                 .beta2 = 0.95f,
                 .eps = 1e-8f,
                 .ema = 0.99f,
                 .correction1 = 0.271f,
                 .correction2 = 0.142625f});
}

/// With a norm that is not finite, nothing may change; elsewhere what lies outside of the tensors may not, which `offset` shows.
void check_adamw(const std::vector<Plan>& plans, Step s, const std::string& title) {
  std::vector<Parameter<Array>> want;
  std::vector<Parameter<DeviceArray>> got;
  for (size_t i = 0; i < plans.size(); ++i) {
    want.push_back(parameter_of(plans[i], static_cast<unsigned>(10 * i)));
    got.push_back(upload(want.back()));
  }
  const Array norm(DType::Float32, 1, s.norm);
  step(cpu::kernels(), plans, want, norm, s.clip);
  step(gpu(), plans, got, DeviceArray(norm), s.clip);
  for (size_t i = 0; i < plans.size(); ++i)
    each_array(got[i], want[i], [&](const DeviceArray& g, const Array& w, const char* which) {
      const std::string name = "adamw " + title + ", tensor " + std::to_string(i) + " of " + std::to_string(plans[i].n) + ", " + which;
      if (std::isfinite(s.norm)) check_close(g.host(), w, w.dtype() == DType::BFloat16 ? 8e-3 : 1e-6, name);
      else check(g.host() == w, name + " untouched");
    });
}

void check_adamw() {
  const std::vector<Plan> plans = {
      {7, 0, true, true, 1e-2f, 0.1f},      {0, 0, true, true, 1e-2f, 0},         {16384, 0, false, true, 3e-2f, 0},
      {1, 0, true, false, 1e-2f, 0.5f},     {0, 0, false, false, 0, 0},           {16385, 0, false, false, 1e-2f, 0.1f},
      {40003, 0, true, true, 1e-2f, 0.1f},  {1025, 1, true, true, 1e-2f, 0.1f},   {100, 2, true, true, 1e-2f, 0.1f},
      {32768, 0, true, false, 1e-2f, 0.1f}, {0, 0, true, true, 0, 0}};
  check_adamw(plans, {.norm = 3, .clip = 1}, "clipped");
  check_adamw(plans, {.norm = 0.5f, .clip = 1}, "below the limit");
  check_adamw({plans[0], plans[7]}, {.norm = 1e6f, .clip = 0}, "without clipping");
  for (int which = 0; which < 6; ++which)
    check_adamw({{100, 1, true, true, 1e-2f, 0.1f, which}}, {.norm = 1, .clip = 1}, "with one not on 16 bytes");
  for (float norm : {INFINITY, -INFINITY, NAN})
    check_adamw({plans[0], plans[7]}, {.norm = norm, .clip = 1}, text("with a norm of %g", norm));
  check_adamw({}, {.norm = 1, .clip = 1}, "of nothing");
  check_adamw({plans[1]}, {.norm = 1, .clip = 1}, "of no elements");
}

/// More tensors than a block has threads, which look for theirs together.
void check_many_tensors() {
  constexpr int64_t kCount = 601;
  Array value(DType::Float32, normal(kCount, 1)), m(DType::Float32, kCount, 0), v(DType::Float32, kCount, 0);
  const Array grad(DType::Float32, normal(kCount, 2)), norm(DType::Float32, 1, 1);
  const DeviceArray on_gpu(value), gpu_m(m), gpu_v(v), gpu_grad(grad), gpu_norm(norm);
  auto list = [&](void* p, void* g, void* first, void* second) {
    std::vector<AdamWParameter> out;
    for (int64_t i = 0; i < kCount; ++i)
      out.push_back({.parameter = floats(p) + i,
                     .grad = floats(g) + i,
                     .m = floats(first) + i,
                     .v = floats(second) + i,
                     .average = nullptr,
                     .compute = nullptr,
                     .n = i % 3 ? 1 : 0,
                     .lr = 1e-2f * static_cast<float>(i + 1),
                     .weight_decay = 0});
    return out;
  };
  auto run = [&](const Kernels& kernels, const std::vector<AdamWParameter>& parameters, const void* n) {
    kernels.adamw({.parameters = parameters.data(),
                   .count = kCount,
                   .norm = static_cast<const float*>(n),
                   .clip = 0,
                   .beta1 = 0.9f,
                   .beta2 = 0.95f,
                   .eps = 1e-3f,
                   .ema = 0,
                   .correction1 = 0.1f,
                   .correction2 = 0.05f});
  };
  run(cpu::kernels(), list(value.data(), grad.data(), m.data(), v.data()), norm.data());
  run(gpu(), list(on_gpu.data(), gpu_grad.data(), gpu_m.data(), gpu_v.data()), gpu_norm.data());
  check_close(on_gpu.host(), value, 1e-6, "adamw of " + std::to_string(kCount) + " tensors");
}

// --- norm of all gradients ---------------------------------------------------------------------------------------------

float run_norm(const std::vector<DeviceArray>& arrays, int64_t offset) {
  std::vector<const float*> x;
  std::vector<int64_t> n;
  for (const DeviceArray& a : arrays) {
    x.push_back(a.as<float>() + offset);
    n.push_back(a.size() - offset);
  }
  const DeviceArray out(DType::Float32, 1);
  gpu().global_norm(x.data(), n.data(), static_cast<int64_t>(x.size()), out.as<float>());
  return static_cast<float>(out.host()[0]);
}

void check_norm(const std::vector<int64_t>& sizes, int64_t offset) {
  std::vector<DeviceArray> arrays;
  double total = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    const Array a(DType::Float32, normal(sizes[i] + offset, static_cast<unsigned>(i), static_cast<float>(i + 1)));
    for (int64_t k = offset; k < a.size(); ++k) total += a[k] * a[k];
    arrays.emplace_back(a);
  }
  const float got = run_norm(arrays, offset);
  const std::string title = "global_norm of " + to_string(Shape(sizes)) + (offset ? ", not on 16 bytes" : "");
  check_below(std::abs(got - std::sqrt(total)), 1e-6 * (1 + std::sqrt(total)), title);
  check(run_norm(arrays, offset) == got, title + ", the same again");
}

void check_norms() {
  check_norm({}, 0);
  check_norm({0, 0}, 0);
  for (const int64_t offset : {0, 1}) {
    check_norm({1}, offset);
    check_norm({7, 0, 16384, 17, 40003, 1025, 0}, offset);
  }
  check_norm(std::vector<int64_t>(301, 3), 0);
  for (const auto& [value, what] : {std::pair{NAN, "NaN"}, std::pair{INFINITY, "infinity"}, std::pair{1e30f, "overflow"}}) {
    std::vector<DeviceArray> arrays;
    Array a(DType::Float32, normal(100, 1));
    a.set(99, value);
    arrays.emplace_back(Array(DType::Float32, normal(5, 1)));
    arrays.emplace_back(a);
    check(!std::isfinite(run_norm(arrays, 0)), std::string("global_norm with ") + what + " is not finite");
  }
}

// --- benchmark ---------------------------------------------------------------------------------------------------------

/// The tensors of a ViT-B/16: 85.6 M parameters in the order of the layers.
std::vector<int64_t> model_sizes(int64_t depth, int64_t width) {
  std::vector<int64_t> sizes = {768 * width, width};
  const int64_t square = width * width;
  for (int64_t l = 0; l < depth; ++l)
    for (int64_t n : {width, width, 3 * square, 3 * width, square, width, width, width, 4 * square, 4 * width, 4 * square, width})
      sizes.push_back(n);
  sizes.insert(sizes.end(), {width, width});
  return sizes;
}

/// All tensors in one piece of memory, as slices.
void bench_adamw(const std::vector<int64_t>& sizes, int64_t n) {
  const DeviceArray value = DeviceArray::normal(DType::Float32, n), grad = DeviceArray::normal(DType::Float32, n, 1e-2f);
  const DeviceArray m(DType::Float32, n), v(DType::Float32, n), average = DeviceArray::normal(DType::Float32, n);
  const DeviceArray compute(DType::BFloat16, n), norm(DType::Float32, 1);
  gpu().fill(m.as<float>(), 1e-2f, n);
  gpu().fill(v.as<float>(), 1e-4f, n);
  std::vector<AdamWParameter> list;
  std::vector<const float*> grads;
  for (int64_t i = 0, at = 0; i < static_cast<int64_t>(sizes.size()); at += sizes[static_cast<size_t>(i++)]) {
    list.push_back({value.as<float>() + at, grad.as<float>() + at, m.as<float>() + at, v.as<float>() + at, average.as<float>() + at,
                    compute.as<bf16>() + at, sizes[static_cast<size_t>(i)], 1e-5f, 0.05f});
    grads.push_back(grad.as<float>() + at);
  }
  const auto count = static_cast<int64_t>(sizes.size());
  const std::string model = text("%.1f M in ", static_cast<double>(n) / 1e6) + std::to_string(count) + " tensors";
  time_gpu("global_norm of " + model, {0, static_cast<double>(grad.bytes())}, DType::Float32,
           [&] { gpu().global_norm(grads.data(), sizes.data(), count, norm.as<float>()); });
  time_gpu("adamw of " + model + ", average and copy", {0, static_cast<double>(n * 38)}, DType::Float32, [&] {
    gpu().adamw({.parameters = list.data(),
                 .count = count,
                 .norm = norm.as<float>(),
                 .clip = 1,
                 .beta1 = 0.9f,
                 .beta2 = 0.95f,
                 .eps = 1e-8f,
                 .ema = 0.999f,
                 .correction1 = 0.5f,
                 .correction2 = 0.5f});
  });
}

}  // namespace

void check_optimizer() {
  check_adamw();
  check_many_tensors();
  check_norms();
}

void bench_optimizer() {
  const std::vector<int64_t> sizes = emulated() ? model_sizes(1, 32) : model_sizes(12, 768);
  bench_adamw(sizes, std::accumulate(sizes.begin(), sizes.end(), int64_t{0}));
}

}  // namespace uniflow::test
