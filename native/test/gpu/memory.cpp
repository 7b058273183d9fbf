/// The device's memory over many rounds, and when it runs out.
#include <chrono>
#include <future>

#include "native/core/device.h"
#include "native/cuda/runtime.h"
#include "native/test/gpu/flow_head.h"

namespace uniflow::test {
namespace {

/// Waits for the work given so far and for what is called after it: until then the allocators do not have everything back.
void drain() {
  std::promise<void> ended;
  gpu_device().backend().after([&](auto) { ended.set_value(); });
  ended.get_future().wait();
}

struct Usage {
  int64_t active, pool, staging, free;
};

Usage usage() {
  drain();
  size_t free = 0, total = 0;
  cuda::check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  const MemoryStats device = gpu_device().memory().stats(), staging = gpu_device().staging().stats();
  return {device.active, device.pool, staging.active + staging.pool, static_cast<int64_t>(free)};
}

/// A linear layer, a norm and two steps of the flow, on one to four pictures of 16 patches.
class Mix {
 public:
  void operator()(int64_t images) {
    const int64_t rows = images * kPatches;
    const Tensor condition = take(DType::BFloat16, {images, kPatches, kWidth}),
                 pixels = take(DType::UInt8, {images, 4 * kPatch, 4 * kPatch, 3});
    linear(x_.data(), condition.data(), rows);
    gpu().norm({.x = condition.data(), .out = condition.data(), .x_dtype = DType::BFloat16, .out_dtype = DType::BFloat16,
                .rows = rows, .width = kWidth, .x_stride = kWidth, .out_stride = kWidth, .rms = false, .eps = 1e-6f,
                .weight = nullptr, .bias = nullptr});
    const ops::FlowOptions o{.schedule = {{0, 0.5f}, {0.5f, 0.5f}}, .noise = {}, .seed = 1,
                             .ids = std::vector<uint32_t>(static_cast<size_t>(images), 0), .rows = 4, .cols = 4, .patch = kPatch,
                             .normalisation = {{0, 0, 0}, {1, 1, 1}}, .pixel_dtype = DType::UInt8};
    gpu().flow_integrate(head_, condition, o, pixels, CancelToken());
  }

  void linear(const void* x, void* out, int64_t rows) const {
    const LinearLayer& l = head_.condition;
    gpu().linear({.x = x, .weight = l.weight.data(), .packing = l.weight.packing().get(), .out = out, .rows = rows, .in = kWidth,
                  .width = kWidth, .x_dtype = DType::BFloat16, .out_dtype = DType::BFloat16, .bias = l.bias.data<float>()});
  }

  /// The linear layer's result for the largest batch.
  Array result() const {
    const DeviceArray out(DType::BFloat16, kMost * kPatches * kWidth);
    linear(x_.data(), out.data(), kMost * kPatches);
    return out.host();
  }

  static constexpr int64_t kMost = 4;

 private:
  static constexpr int64_t kWidth = 64, kPatch = 4, kPatches = 16;

  static Tensor take(DType dtype, Shape shape) {
    Tensor t(gpu_device(), dtype, std::move(shape));
    t.buffer()->allocate();
    return t;
  }

  FlowHead head_ = make_flow_head(
      [](const std::string& name, int64_t n) { return Array(DType::Float32, test::normal(n, static_cast<unsigned>(name.size()), 0.1f)); },
      kWidth, 3 * kPatch * kPatch, 2, DType::BFloat16);
  DeviceArray x_ = DeviceArray::normal(DType::BFloat16, kMost * kPatches * kWidth);
};

void check_rounds(Mix& mix) {
  const int rounds = emulated() ? 100 : 1000;
  for (int64_t i = 0; i < 8 * Mix::kMost; ++i) mix(1 + i % Mix::kMost);  // until the pool has blocks of every size that is asked for
  const Usage before = usage();
  for (int64_t i = 0; i < rounds; ++i) mix(1 + i % Mix::kMost);
  const Usage after = usage();
  const std::string name = " after " + std::to_string(rounds) + " rounds of linear, norm and flow";
  auto grown = [](int64_t now, int64_t then) { return std::to_string(now - then) + " bytes more"; };
  check(after.active == before.active, "tensors' memory is what it was" + name, grown(after.active, before.active));
  check(after.pool <= before.pool, "so is the pool", grown(after.pool, before.pool));
  check(after.staging <= before.staging + (8 << 20), "so is page-locked memory", grown(after.staging, before.staging));
  check(before.free - after.free <= 8 << 20, "and the device's free memory", grown(before.free, after.free));  // the driver may take a page
}

/// One request is beyond any device; work before and after it is as if nothing had happened.
void check_exhaustion(Mix& mix) {
  const Array before = mix.result();
  constexpr int64_t bytes = int64_t{1} << 45;
  std::string what;
  const std::string code = error_code([&] {
    try {
      Tensor(gpu_device(), DType::UInt8, {bytes}).buffer()->allocate();
    } catch (const Error& e) {
      what = e.what();
      throw;
    }
  });
  check(code == "OUT_OF_MEMORY" && what.find(std::to_string(bytes)) != std::string::npos, "more than there is fails, and says how much",
        code + ", " + what);
  check(mix.result() == before, "the next kernel works");
}

/// Freeing memory waits until the device is idle; whoever gives it back does not.
void check_release_does_not_wait() {
  using Clock = std::chrono::steady_clock;
  Tensor weight(gpu_device(), DType::UInt8, {1 << 20}, Placement::Persistent);
  weight.buffer()->allocate();
  std::promise<void> released;
  std::future<void> until = released.get_future();
  auto hold = [](void* future) { static_cast<std::future<void>*>(future)->wait_for(std::chrono::seconds(5)); };
  cuda::check(cudaLaunchHostFunc(cuda::stream(), hold, &until), "cudaLaunchHostFunc");
  const auto begin = Clock::now();
  weight = Tensor();
  const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
  released.set_value();
  drain();
  check(seconds < 1, "a weight is given back while the device works", text("%.3f s", seconds));
}

/// Memory that was given back a moment ago is there for whoever needs it.
void check_released_is_there() {
  size_t free = 0, total = 0;
  gpu_device().memory().trim();
  drain();
  cuda::check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  const auto most = static_cast<int64_t>(free / 10 * 6);
  const std::string code = error_code([&] {
    for (int i = 0; i < 3; ++i) Tensor(gpu_device(), DType::UInt8, {most}, Placement::Persistent).buffer()->allocate();
  });
  check(code == "nothing", "most of the memory, three times in a row", code);
}

/// Pooled memory is returned to the device before an allocation fails.
void check_pool_yields() {
  size_t free = 0, total = 0;
  gpu_device().memory().trim();
  cuda::check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  const int64_t most = static_cast<int64_t>(free) / 10 * 6;  // twice would be too much
  Tensor(gpu_device(), DType::UInt8, {most}).buffer()->allocate();
  const std::string code = error_code([&] { Tensor(gpu_device(), DType::UInt8, {most}, Placement::Persistent).buffer()->allocate(); });
  check(code == "nothing", "the pool's memory is there for who needs it", code);
  gpu_device().memory().trim();
}

}  // namespace

void check_memory() {
  Mix mix;
  check_rounds(mix);
  check_exhaustion(mix);
  check_release_does_not_wait();
  check_released_is_there();
  if (!emulated()) check_pool_yields();  // it takes most of the device
}

}  // namespace uniflow::test
