/// Uploads and downloads: values that come through the chunks of page-locked memory whole, and how far uploads hide behind the work before
/// them: batches of pictures, each followed by a product, through the device's stream as the
/// tokenizer gives it its work.
#include <chrono>
#include <future>

#include "native/core/device.h"
#include "native/cuda/runtime.h"
#include "native/test/gpu/flow_head.h"
#include "native/test/gpu/timing.h"

namespace uniflow::test {
namespace {

class Pipeline {
 public:
  Pipeline(int64_t rows, int64_t width, int64_t picture_bytes)
      : rows_(rows),
        width_(width),
        weight_(make_weight(Array(DType::Float32, test::normal(width * width, 1, 0.02f)), width, width, DType::BFloat16)),
        x_(DeviceArray::normal(DType::BFloat16, rows * width)),
        out_(DType::BFloat16, rows * width),
        pictures_(gpu_device(), DType::UInt8, {picture_bytes}, Placement::Staging) {
    pictures_.buffer()->allocate();
    std::memset(pictures_.data(), 1, static_cast<size_t>(picture_bytes));
  }

  /// Milliseconds for `rounds` of an upload, a product, or both, from queueing the first to the end of the last.
  double time(int rounds, bool upload, bool product) const {
    const auto session = std::make_shared<Session>();
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < rounds; ++i) {
      const Tensor batch(gpu_device(), DType::UInt8, pictures_.shape(), Placement::Transfer);
      if (upload) enqueue(session, {"upload", {}, {batch}, [=, this](const Run& run) { run.backend.upload(batch, pictures_); }});
      if (product) enqueue(session, {"product", {upload ? batch : Tensor()}, {}, [this](const Run& run) { multiply(run.kernels); }});
    }
    std::promise<void> ended;
    enqueue(session, {"end", {}, {}, [](const Run&) {}, [&](auto) { ended.set_value(); }});
    ended.get_future().wait();
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
  }

 private:
  static void enqueue(const std::shared_ptr<Session>& session, Command command) {
    gpu_device().stream().enqueue(session, std::move(command));
  }

  void multiply(const Kernels& k) const {
    k.linear({.x = x_.data(), .weight = weight_.data(), .packing = weight_.packing().get(), .out = out_.data(), .rows = rows_,
              .in = width_, .width = width_, .x_dtype = DType::BFloat16, .out_dtype = DType::BFloat16});
  }

  int64_t rows_, width_;
  Tensor weight_;
  DeviceArray x_, out_;
  Tensor pictures_;
};

/// The emulator's chunks have 64 KiB, so that some of these take several.
void check_download(int64_t n, DType from, DType to, Placement placement) {
  const Array values(from, normal(n, 1));
  Tensor x(gpu_device(), from, {n}, placement);
  x.buffer()->allocate();
  if (n > 0) cuda::check(cudaMemcpyAsync(x.data(), values.data(), static_cast<size_t>(x.bytes()), cudaMemcpyHostToDevice, cuda::stream()), "cudaMemcpyAsync");
  Array got(to, n), want(to, n);
  for (int64_t i = 0; i < n; ++i) want.set(i, values[i]);
  std::promise<std::shared_ptr<const Error>> ended;
  gpu_device().backend().download(got.data(), to, x);
  if (placement == Placement::Persistent && n > 0)  // as an optimizer does, right after the weights are read
    cuda::check(cudaMemsetAsync(x.data(), 0, static_cast<size_t>(x.bytes()), cuda::stream()), "cudaMemsetAsync");
  gpu_device().backend().after([&](std::shared_ptr<const Error> failure) { ended.set_value(std::move(failure)); });
  x = Tensor();
  const auto failure = ended.get_future().get();
  check(!failure && got == want, "download of " + std::to_string(n) + " " + name_of(from) + " as " + name_of(to) +
                                     (placement == Placement::Persistent ? ", written to afterwards" : ""),
        failure ? failure->what() : "");
}

/// Many at once: each callback finds the values of the downloads before it.
void check_many_downloads() {
  constexpr int64_t kEach = 50001;
  constexpr int kMany = 8;
  std::vector<Array> got;
  for (int i = 0; i < kMany; ++i) got.emplace_back(DType::Float32, kEach);
  std::promise<void> ended;
  int whole = 0;
  for (int i = 0; i < kMany; ++i) {
    const Tensor x = to_gpu(Array(DType::Float32, kEach, i + 1), {kEach});
    gpu_device().backend().download(got[static_cast<size_t>(i)].data(), DType::Float32, x);
    gpu_device().backend().after([&, i](auto) {
      whole += got[static_cast<size_t>(i)] == Array(DType::Float32, kEach, i + 1);
      if (i + 1 == kMany) ended.set_value();
    });
  }
  ended.get_future().wait();
  check(whole == kMany, "a callback finds the values of the downloads before it", std::to_string(whole) + " of " + std::to_string(kMany));
}

}  // namespace

void check_upload() {
  constexpr DType kFloat = DType::Float32, kHalf = DType::BFloat16;
  for (const int64_t n : {0, 1, 16384, 16385, 200001})
    for (const Placement placement : {Placement::Pooled, Placement::Persistent})
      for (const auto& [from, to] : {std::pair{kFloat, kFloat}, {kHalf, kFloat}, {kFloat, kHalf}, {kHalf, kHalf}}) check_download(n, from, to, placement);
  check_many_downloads();
  const MemoryStats staging = gpu_device().staging().stats();
  check(!emulated() || staging.active + staging.pool < 3 << 20, "downloads of any size take a few chunks of page-locked memory",
        std::to_string(staging.active + staging.pool) + " bytes");
}

void bench_upload() {
  const int64_t batch = emulated() ? 1 : 32, rows = emulated() ? 8 : batch * 1025;
  const int64_t width = emulated() ? 32 : 4096, side = emulated() ? 14 : 448;
  const std::string name = "upload " + std::to_string(batch) + "x" + std::to_string(side) + "x" + std::to_string(side) + "x3 and product " +
                           to_string({rows, width, width});
  if (!row_wanted(name, DType::BFloat16)) return;
  const int rounds = emulated() ? 2 : 30;
  const Pipeline pipeline(rows, width, batch * side * side * 3);
  double both = 0, product = 0, upload = 0;
  for (int i = 0; i < 2; ++i) {  // the first time fills the pools
    upload = pipeline.time(rounds, true, false) / rounds;
    product = pipeline.time(rounds, false, true) / rounds;
    both = pipeline.time(rounds, true, true) / rounds;
  }
  const double hidden = (upload + product - both) / std::min(upload, product);
  add_row(name, DType::BFloat16, both, {{"uploadMs", upload}, {"productMs", product}, {"hidden", hidden}},
          "upload " + text("%.3f ms", upload) + ", product " + text("%.3f ms", product) + ": " + text("%.0f %%", 100 * hidden) +
              " of the shorter is hidden");
}

}  // namespace uniflow::test
