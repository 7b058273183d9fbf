/// The reference's values, made in float64, that a kernel alone (or a few) can be held against: the patch embedding, the flow's
/// velocity and integration, the distillation loss and its gradient, the norm of a step's gradients.
#include <cmath>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>

#include "native/core/safetensors.h"
#include "native/test/gpu/flow_head.h"

namespace uniflow::test {
namespace {

/// The tolerances of test/support.ts: relative L2.
double tolerance(DType dtype) { return dtype == DType::BFloat16 ? 2e-2 : 2e-4; }
double decode_tolerance(DType dtype) { return dtype == DType::BFloat16 ? 2e-2 : 1e-3; }

/// The float32 tensors of one file.
class Reference {
 public:
  explicit Reference(const std::string& path) : file_(SafetensorsFile::open(path)) {}

  Array operator[](const std::string& name) const {
    const auto found = file_->entries().find(name);
    if (found == file_->entries().end() || found->second.dtype != FileDType::F32)
      throw Error(ErrorCode::BadCheckpoint, file_->path() + ": no float32 tensor " + name);
    Array out(DType::Float32, static_cast<int64_t>(found->second.bytes / sizeof(float)));
    std::memcpy(out.data(), found->second.data, found->second.bytes);
    return out;
  }
  Parameters parameters() const {
    return [this](const std::string& name, int64_t n) {
      Array values = (*this)[name];
      if (values.size() != n) throw Error(ErrorCode::BadCheckpoint, name, std::to_string(n) + " values", std::to_string(values.size()));
      return values;
    };
  }
  std::vector<Array> all(const std::string& prefix) const {
    std::vector<Array> out;
    for (const auto& [name, entry] : file_->entries())
      if (name.rfind(prefix, 0) == 0) out.push_back((*this)[name]);
    return out;
  }

 private:
  std::shared_ptr<SafetensorsFile> file_;
};

nlohmann::json read_json(const std::string& path) {
  std::ifstream in(path);
  if (!in) throw Error(ErrorCode::BadInput, "cannot read " + path);
  return nlohmann::json::parse(in);
}

Array cast(const Array& values, DType dtype) {
  Array out(dtype, values.size());
  for (int64_t i = 0; i < values.size(); ++i) out.set(i, values[i]);
  return out;
}

Array part(const Array& values, int64_t begin, int64_t end) {
  Array out(values.dtype(), end - begin);
  for (int64_t i = begin; i < end; ++i) out.set(i - begin, values[i]);
  return out;
}

/// |got - want| / |want|, as vectors.
void check_l2(const Array& got, const Array& want, double floor, const std::string& name) {
  double difference = 0, norm = 0;
  for (int64_t i = 0; i < want.size(); ++i) {
    difference += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  const double error = std::sqrt(difference / norm);
  check_below(std::isfinite(error) && got.size() == want.size() ? error : std::numeric_limits<double>::infinity(), floor, "golden " + name);
}

// --- uniflow-tiny: D 64, patches of 14 x 14, pictures of 4 x 4 patches ------------------------------------------------------

constexpr int64_t kWidth = 64, kPatch = 14, kPixels = 3 * kPatch * kPatch, kImages = 2, kGrid = 4, kPatches = kGrid * kGrid;

/// hidden.0: unfold, linear, assemble. The class token's position is in the prefix.
void check_patch_embedding(const Reference& model, const Reference& golden, DType dtype) {
  const Array table = model["embeddings.position_embedding"];
  Array prefix = model["embeddings.class_embedding"];
  for (int64_t i = 0; i < kWidth; ++i) prefix.set(i, prefix[i] + table[i]);
  const DeviceArray pixels(golden["pixels"]), position(part(table, kWidth, table.size())), front(prefix),
      bias(model["embeddings.patch_embedding.bias"]);
  const Tensor weight = make_weight(model["embeddings.patch_embedding.weight"], kWidth, kPixels, dtype);
  const DeviceArray vectors(dtype, kImages * kPatches * kPixels), embedded(dtype, kImages * kPatches * kWidth),
      tokens(dtype, kImages * (1 + kPatches) * kWidth);
  gpu().unfold({.pixels = pixels.data(), .pixel_dtype = DType::Float32, .out = vectors.data(), .dtype = dtype, .batch = kImages,
                .height = kGrid * kPatch, .width = kGrid * kPatch, .patch = kPatch, .mean = {0, 0, 0}, .std = {1, 1, 1}});
  gpu().linear({.x = vectors.data(), .weight = weight.data(), .packing = weight.packing().get(), .out = embedded.data(),
                .rows = kImages * kPatches, .in = kPixels, .width = kWidth, .x_dtype = dtype, .out_dtype = dtype,
                .bias = bias.as<float>()});
  gpu().assemble({.patches = embedded.data(), .out = tokens.data(), .dtype = dtype, .batch = kImages, .patch_count = kPatches,
                  .prefix_count = 1, .width = kWidth, .prefix = front.as<float>(), .position = position.as<float>()});
  check_l2(tokens.host(), golden["hidden.0"], tolerance(dtype), std::string("patch embedding, ") + name_of(dtype));
}

void check_velocity(const FlowHead& head, const Reference& golden, DType dtype) {
  const int64_t rows = kImages * kPatches;
  const Tensor x = to_gpu(golden["noise"], {rows, kPixels}), t = to_gpu(golden["time"], {rows}),
               c = to_gpu(cast(golden["condition"], dtype), {rows, kWidth});
  const Tensor v = to_gpu(Array(DType::Float32, rows * kPixels), {rows, kPixels});
  gpu().flow_velocity(head, x, t, c, v);
  check_l2(to_host(v), golden["velocity"], tolerance(dtype), std::string("flow velocity, ") + name_of(dtype));
}

/// The reference's grid, as lib/decoder/schedule.ts makes it.
ops::FlowSchedule schedule(int steps, double power) {
  auto at = [&](int k) { return 1 - std::pow(static_cast<double>(steps - k) / steps, 1 / power); };
  ops::FlowSchedule s;
  for (int k = 0; k < steps; ++k) {
    s.time.push_back(static_cast<float>(at(k)));
    s.step.push_back(static_cast<float>(at(k + 1) - at(k)));
  }
  return s;
}

void check_integration(const FlowHead& head, const Reference& golden, DType dtype) {
  struct Case {
    const char* name;
    int steps;
    double power;
    float guidance;
  };
  const Tensor condition = to_gpu(cast(golden["condition"], dtype), {kImages, kPatches, kWidth}),
               noise = to_gpu(golden["noise"], {kImages, kPatches, kPixels});
  for (const Case& c : {Case{"linear1", 1, 1, 1}, {"linear4", 4, 1, 1}, {"pow0.25x5", 5, 0.25, 1}, {"linear4_guided1.5", 4, 1, 1.5f}}) {
    ops::FlowOptions o{.schedule = schedule(c.steps, c.power), .guidance = c.guidance, .noise = noise, .ids = {0, 0},
                       .rows = kGrid, .cols = kGrid, .patch = kPatch, .normalisation = {}, .pixel_dtype = DType::Float32};
    const Shape shape{kImages, 3, kGrid * kPatch, kGrid * kPatch};
    const Tensor pixels = to_gpu(Array(DType::Float32, count(shape)), shape);
    // as it comes, then recorded as a graph, then from the graph alone
    for (int i = 0; i < 3; ++i) gpu().flow_integrate(head, condition, o, pixels, CancelToken());
    check_l2(to_host(pixels), golden[std::string("image.") + c.name], decode_tolerance(dtype),
             std::string("decode ") + c.name + ", " + name_of(dtype));
  }
}

void check_tokenizer(const std::string& folder) {
  const Reference model(folder + "/model.safetensors"), golden(folder + "/golden.safetensors");
  for (const DType dtype : {DType::Float32, DType::BFloat16}) {
    check_patch_embedding(model, golden, dtype);
    const FlowHead head = make_flow_head(model.parameters(), kWidth, kPixels, 2, dtype);
    check_velocity(head, golden, dtype);
    check_integration(head, golden, dtype);
  }
}

// --- training ----------------------------------------------------------------------------------------------------------

/// Float32: 6 layers of [2, 10, 32], a zero token among them. The reference's gradient has the layers' weights in it.
void check_distillation_of(const std::string& folder) {
  constexpr int64_t layers = 6, batch = 2, tokens = 10, width = 32;
  const Reference golden(folder + "/distillation.safetensors");
  std::vector<DeviceArray> student, teacher, grad;
  std::vector<const void*> students, teachers;
  std::vector<void*> grads;
  for (int64_t l = 0; l < layers; ++l) {
    student.emplace_back(golden["student." + std::to_string(l)]);
    teacher.emplace_back(golden["teacher." + std::to_string(l)]);
    grad.emplace_back(DType::Float32, batch * tokens * width);
    students.push_back(student.back().data());
    teachers.push_back(teacher.back().data());
    grads.push_back(grad.back().data());
  }
  const DeviceArray loss(DType::Float32, 1), alpha(DType::Float32, layers), weight(DType::Float32, layers);
  const nlohmann::json expected = read_json(folder + "/distillation.json");
  for (const auto& [beta, want] : expected.items()) {
    gpu().distillation({.student = students.data(), .teacher = teachers.data(), .grad = grads.data(), .dtype = DType::Float32,
                        .layers = layers, .batch = batch, .tokens = tokens, .width = width, .skip = 0, .beta = std::stof(beta),
                        .weights = LayerWeights::Adaptive, .loss = loss.as<float>(), .alpha = alpha.as<float>(),
                        .weight = weight.as<float>()});
    const std::string name = "golden distillation, beta " + beta + ", ";
    check_close(loss.host(), Array(DType::Float32, 1, want["loss"].get<double>()), 1e-5, name + "loss");
    check_close(alpha.host(), Array(DType::Float32, want["alpha"].get<std::vector<float>>()), 1e-5, name + "alpha");
    check_close(weight.host(), Array(DType::Float32, want["weight"].get<std::vector<float>>()), 1e-5, name + "weight");
    const Array weights = weight.host();
    for (int64_t l = 0; l < layers; ++l) {
      Array got = grad[static_cast<size_t>(l)].host();
      for (int64_t i = 0; i < got.size(); ++i) got.set(i, got[i] * weights[l]);
      check_l2(got, golden["beta" + beta + ".grad." + std::to_string(l)], 1e-3, "distillation, beta " + beta + ", layer " + std::to_string(l));
    }
  }
}

/// Checks the global norm of the gradients of the first training step.
void check_gradient_norm(const std::string& folder) {
  const Reference golden(folder + "/training.safetensors");
  std::vector<DeviceArray> grads;
  std::vector<const float*> pointers;
  std::vector<int64_t> sizes;
  for (const Array& g : golden.all("grad.")) {
    grads.emplace_back(g);
    pointers.push_back(grads.back().as<float>());
    sizes.push_back(g.size());
  }
  const DeviceArray norm(DType::Float32, 1);
  gpu().global_norm(pointers.data(), sizes.data(), static_cast<int64_t>(sizes.size()), norm.as<float>());
  const double want = read_json(folder + "/training.json")["log"][0]["grad_norm"];
  check_close(norm.host(), Array(DType::Float32, 1, want), 1e-5, "golden norm of " + std::to_string(sizes.size()) + " gradients");
}

}  // namespace

void check_golden(const std::string& folder) {
  check_tokenizer(folder + "/uniflow-tiny");
  check_distillation_of(folder + "/distillation");
  check_gradient_norm(folder + "/uniflow-tiny");
}

}  // namespace uniflow::test
