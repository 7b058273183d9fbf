/// The distillation loss on the GPU, of all layers at once, against the CPU's.
#include "native/test/gpu/gpu.h"

namespace uniflow::test {
namespace {

constexpr DType kTypes[] = {DType::BFloat16, DType::Float32};

double tolerance_of(DType dtype) { return dtype == DType::BFloat16 ? 1e-2 : 1e-5; }

struct Case {
  DType dtype;
  int64_t layers, batch, tokens, width, skip;
  float beta = 2;
  LayerWeights weights = LayerWeights::Adaptive;
  bool grads = true;
  int64_t offset = 0;  // of every layer in its memory, in elements: 1 is no address for vectors
};

std::string text_of(const Case& c) {
  return std::string("distillation ") + name_of(c.dtype) + " " + std::to_string(c.layers) + " x " +
         to_string(Shape{c.batch, c.tokens, c.width}) + ", skip " + std::to_string(c.skip);
}

/// One tensor for each layer, of either kind of array.
template <class A>
struct Stack {
  std::vector<A> layers;
  std::vector<void*> pointers;

  void add(A layer, int64_t offset) {
    pointers.push_back(static_cast<std::byte*>(layer.data()) + offset * size_of(layer.dtype()));
    layers.push_back(std::move(layer));
  }
};

template <class A>
struct Results {
  Stack<A> grads;
  A loss, alpha, weight;

  explicit Results(const Case& c) : loss(DType::Float32, 1), alpha(DType::Float32, c.layers), weight(DType::Float32, c.layers) {
    for (int64_t l = 0; c.grads && l < c.layers; ++l) grads.add(A(c.dtype, c.offset + c.batch * c.tokens * c.width), c.offset);
  }
};

template <class A>
void run(const Kernels& kernels, const Case& c, const Stack<A>& student, const Stack<A>& teacher, const Results<A>& r) {
  kernels.distillation({.student = student.pointers.data(),
                        .teacher = teacher.pointers.data(),
                        .grad = c.grads ? r.grads.pointers.data() : nullptr,
                        .dtype = c.dtype,
                        .layers = c.layers,
                        .batch = c.batch,
                        .tokens = c.tokens,
                        .width = c.width,
                        .skip = c.skip,
                        .beta = c.beta,
                        .weights = c.weights,
                        .loss = static_cast<float*>(r.loss.data()),
                        .alpha = static_cast<float*>(r.alpha.data()),
                        .weight = static_cast<float*>(r.weight.data())});
}

/// Divided by what makes the largest of `like` one: the gradient of a mean over many tokens is small.
Array scaled(const Array& a, const Array& like, int64_t offset) {
  double largest = 0;
  for (int64_t i = offset; i < like.size(); ++i)
    if (std::isfinite(like[i])) largest = std::max(largest, std::abs(like[i]));
  Array out(DType::Float32, a.size() - offset);
  for (int64_t i = offset; i < a.size(); ++i) out.set(i - offset, largest > 0 ? a[i] / largest : a[i]);
  return out;
}

void check_grads(const Case& c, const Results<DeviceArray>& got, const Results<Array>& want, const std::string& title) {
  for (size_t l = 0; l < want.grads.layers.size(); ++l) {
    if (l > 0 && l + 1 < want.grads.layers.size() && l % 63) continue;  // first, last, and around the limit of one launch
    const Array host = got.grads.layers[l].host(), &reference = want.grads.layers[l];
    const std::string name = title + ", gradient " + std::to_string(l);
    if (c.width == 1) check_close(host, reference, 1, name);  // a number has no direction to turn: zero, give or take 1 / |student| roundings
    else check_close(scaled(host, reference, c.offset), scaled(reference, reference, c.offset), tolerance_of(c.dtype), name);
  }
}

/// The same bits from a second run.
void check_repeats(const Case& c, const Stack<DeviceArray>& student, const Stack<DeviceArray>& teacher, const Results<DeviceArray>& first,
                   const std::string& title) {
  const Results<DeviceArray> second(c);
  run(gpu(), c, student, teacher, second);
  bool same = first.loss.host() == second.loss.host() && first.alpha.host() == second.alpha.host();
  for (size_t l = 0; l < first.grads.layers.size(); ++l) same = same && first.grads.layers[l].host() == second.grads.layers[l].host();
  check(same, title + ", the same again");
}

/// `change` edits the rows of a layer before the comparison.
void check_case(const Case& c, const std::string& what = "",
                const std::function<void(int64_t layer, Array& student, Array& teacher)>& change = nullptr) {
  const int64_t n = c.offset + c.batch * c.tokens * c.width;
  Stack<Array> student, teacher;
  Stack<DeviceArray> gpu_student, gpu_teacher;
  for (int64_t l = 0; l < c.layers; ++l) {
    const auto seed = static_cast<unsigned>(2 * l);
    std::vector<float> s = normal(n, seed + 1), t = normal(n, seed + 2, 3);
    for (size_t i = 0; i < t.size(); ++i) t[i] += static_cast<float>(l % 5) * s[i];  // alphas that differ
    Array a(c.dtype, s), b(c.dtype, t);
    if (change) change(l, a, b);
    gpu_student.add(DeviceArray(a), c.offset);
    gpu_teacher.add(DeviceArray(b), c.offset);
    student.add(std::move(a), c.offset);
    teacher.add(std::move(b), c.offset);
  }
  const Results<Array> want(c);
  const Results<DeviceArray> got(c);
  run(cpu::kernels(), c, student, teacher, want);
  run(gpu(), c, gpu_student, gpu_teacher, got);
  const std::string title = text_of(c) + what;
  check_close(got.alpha.host(), want.alpha, 1e-5, title + ", alpha");
  check_close(got.weight.host(), want.weight, 1e-5, title + ", weights");
  check_close(got.loss.host(), want.loss, 1e-5, title + ", loss");
  check_grads(c, got, want, title);
  if (!change) check_repeats(c, gpu_student, gpu_teacher, got, title);
}

/// Rows that are zero, or shorter than 1e-8, have no direction.
void check_short_rows(DType dtype, int64_t width) {
  check_case({.dtype = dtype, .layers = 2, .batch = 1, .tokens = 7, .width = width, .skip = 0}, ", short rows",
             [&](int64_t, Array& s, Array& t) {
               for (int64_t i = 0; i < width; ++i) {
                 s.set(i, 0);
                 t.set(2 * width + i, 0);
                 s.set(3 * width + i, i == 0 ? 0.9e-8 : 0);
                 s.set(4 * width + i, i == 0 ? 1.2e-8 : 0);
                 t.set(5 * width + i, i == 0 ? 1.2e-8 : 0);
               }
             });
}

/// Non-finite values reach the loss, unless their token is skipped.
void check_broken_rows() {
  const Case c = {.dtype = DType::Float32, .layers = 1, .batch = 2, .tokens = 5, .width = 64, .skip = 1};
  check_case(c, ", NaN in a skipped token", [&](int64_t, Array& s, Array&) { s.set(5, NAN); });
  Stack<DeviceArray> student, teacher;
  std::vector<float> values = normal(2 * 5 * 64, 1);
  values[100] = INFINITY;
  student.add(DeviceArray(Array(c.dtype, values)), 0);
  teacher.add(DeviceArray(Array(c.dtype, normal(2 * 5 * 64, 2))), 0);
  const Results<DeviceArray> got(c);
  run(gpu(), c, student, teacher, got);
  check(std::isnan(got.loss.host()[0]), "distillation: an infinite value makes the loss NaN");
}

}  // namespace

void check_distillation() {
  for (const DType dtype : kTypes) {
    // by width: single elements, then 1, 2, 3, 4, 6, 8 vectors a lane or more, then rows that are read twice
    for (const int64_t width : {1, 7, 17, 1025, 8, 64, 384, 768, 1024, 1536, 2048, 4096})
      check_case({.dtype = dtype, .layers = 2, .batch = 2, .tokens = 5, .width = width, .skip = 1});
    for (const LayerWeights weights : {LayerWeights::Uniform, LayerWeights::Last})
      check_case({.dtype = dtype, .layers = 3, .batch = 1, .tokens = 17, .width = 64, .skip = 5, .weights = weights});
    check_case({.dtype = dtype, .layers = 70, .batch = 3, .tokens = 3, .width = 24, .skip = 0, .beta = 30});
    check_case({.dtype = dtype, .layers = 2, .batch = 1, .tokens = 101, .width = 32, .skip = 1, .grads = false}, ", no gradients");
    check_case({.dtype = dtype, .layers = 2, .batch = 1, .tokens = 6, .width = 64, .skip = 1, .offset = 1}, ", not on 16 bytes");
    for (const int64_t width : {7, 64}) check_short_rows(dtype, width);
  }
  check_broken_rows();
}

void bench_distillation() {
  for (const DType dtype : kTypes) {
    const Case c = emulated() ? Case{.dtype = dtype, .layers = 2, .batch = 1, .tokens = 5, .width = 64, .skip = 1}
                              : Case{.dtype = dtype, .layers = 24, .batch = 4, .tokens = 1025, .width = 1024, .skip = 1};
    const int64_t n = c.batch * c.tokens * c.width;
    Stack<DeviceArray> student, teacher;
    for (int64_t l = 0; l < c.layers; ++l) {
      student.add(DeviceArray::normal(dtype, n), 0);
      teacher.add(DeviceArray::normal(dtype, n, 3), 0);
    }
    const Results<DeviceArray> results(c);
    const Work work = {0, static_cast<double>(3 * c.layers * n * size_of(dtype))};
    time_gpu(std::to_string(c.layers) + " x " + to_string(Shape{c.batch, c.tokens, c.width}), work, dtype,
             [&] { run(gpu(), c, student, teacher, results); });
  }
}

}  // namespace uniflow::test
