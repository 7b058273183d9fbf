#include "native/test/gpu/timing.h"

#include <algorithm>

#include "native/core/device.h"
#include "native/cuda/runtime.h"

namespace uniflow::test {
namespace {

constexpr double kWarmUpMs = 50, kMeasureMs = 300, kSampleMs = 2;  // a shorter sample would time the launches as well
constexpr int kSamples = 10, kMostSamples = 200, kMostCalls = 1000;

struct Table {
  Yardsticks yardsticks{};
  std::function<bool(const std::string&)> wanted;
  std::string family;
  nlohmann::json rows = nlohmann::json::array();
};

Table& table() {
  static Table instance;
  return instance;
}

/// Two points in the device's work, and the time between them.
class Stopwatch {
 public:
  Stopwatch() {
    for (cudaEvent_t* e : {&begin_, &end_}) cuda::check(cudaEventCreate(e), "cudaEventCreate");
  }
  ~Stopwatch() {
    for (cudaEvent_t e : {begin_, end_}) cudaEventDestroy(e);
  }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

  /// Milliseconds per call, on the device.
  double operator()(const std::function<void()>& run, int calls) {
    cuda::check(cudaEventRecord(begin_, cuda::stream()), "cudaEventRecord");
    for (int i = 0; i < calls; ++i) run();
    cuda::check(cudaEventRecord(end_, cuda::stream()), "cudaEventRecord");
    cuda::check(cudaEventSynchronize(end_), "cudaEventSynchronize");
    float ms = 0;
    cuda::check(cudaEventElapsedTime(&ms, begin_, end_), "cudaEventElapsedTime");
    return double{ms} / calls;
  }

 private:
  cudaEvent_t begin_{}, end_{};
};

/// Time of one call: the median of samples of several calls each, after warm-up.
struct Timing {
  double median_ms, min_ms;
  int samples, calls_per_sample;
};

Timing time_calls(const std::function<void()>& run) {
  Stopwatch watch;
  if (emulated()) {
    const double ms = watch(run, 1);
    return {ms, ms, 1, 1};
  }
  double fastest = watch(run, 1);  // the first call loads the kernel, and fills the pools
  for (double spent = 0; spent < kWarmUpMs; spent += fastest + 0.01) fastest = std::min(fastest, watch(run, 1));
  const int calls = static_cast<int>(std::clamp(std::ceil(kSampleMs / std::max(fastest, 1e-4)), 1.0, static_cast<double>(kMostCalls)));
  std::vector<double> ms;
  for (double spent = 0; std::ssize(ms) < kSamples || (spent < kMeasureMs && std::ssize(ms) < kMostSamples); spent += ms.back() * calls)
    ms.push_back(watch(run, calls));
  std::sort(ms.begin(), ms.end());
  const size_t middle = ms.size() / 2;
  return {ms.size() % 2 ? ms[middle] : (ms[middle - 1] + ms[middle]) / 2, ms[0], static_cast<int>(ms.size()), calls};
}

std::string milliseconds(double ms) { return text(ms >= 100 ? "%.0f" : ms >= 1 ? "%.2f" : "%.4f", ms); }
std::string percent(double share) { return std::isfinite(share) ? text("%.0f %%", 100 * share) : "-"; }

void print_row(const char* family, const char* name, const char* dtype, const std::string& ms, const std::string& rate,
               const std::string& share, const char* bound) {
  std::printf("%-18s %-52s %-9s %10s %15s %7s  %s\n", family, name, dtype, ms.c_str(), rate.c_str(), share.c_str(), bound);
  std::fflush(stdout);
}

}  // namespace

Yardsticks measure_yardsticks() {
  const int64_t bytes = emulated() ? 1 << 16 : 1 << 30;
  const DeviceArray from = DeviceArray::normal(DType::Float32, bytes / 4), to(DType::Float32, bytes / 4);
  return {gpu().peak(DType::BFloat16), gpu().peak(DType::Float32), gpu().copy_rate(to.data(), from.data(), bytes)};
}

std::string to_text(const Yardsticks& y) {
  return "bfloat16 " + text("%.1f", y.bfloat16 / 1e12) + " TFLOP/s, float32 " + text("%.1f", y.float32 / 1e12) + " TFLOP/s, copy " +
         text("%.0f", y.copy / 1e9) + " GB/s";
}

nlohmann::json to_json(const Yardsticks& y) { return {{"bfloat16", y.bfloat16}, {"float32", y.float32}, {"copy", y.copy}}; }

void begin_table(const Yardsticks& yardsticks, std::function<bool(const std::string&)> wanted) {
  table().yardsticks = yardsticks;
  table().wanted = std::move(wanted);
  print_row("family", "kernel", "dtype", "median ms", "achieved", "of best", "");
}

void begin_family(const std::string& family) { table().family = family; }

bool row_wanted(const std::string& name, DType dtype) { return table().wanted(table().family + " " + name + " " + name_of(dtype)); }

const nlohmann::json& table_rows() { return table().rows; }

void add_row(const std::string& name, DType dtype, double median_ms, nlohmann::json figures, const std::string& note) {
  print_row(table().family.c_str(), name.c_str(), name_of(dtype), milliseconds(median_ms), "", "", note.c_str());
  table().rows.push_back(
      {{"family", table().family}, {"name", name}, {"dtype", name_of(dtype)}, {"medianMs", median_ms}, {"figures", std::move(figures)}});
}

namespace {

void add_timed_row(const std::string& name, Work work, DType dtype, const Timing& t) {
  const Yardsticks& y = table().yardsticks;
  const double compute_ms = 1e3 * work.flops / (dtype == DType::BFloat16 ? y.bfloat16 : y.float32), memory_ms = 1e3 * work.bytes / y.copy;
  const bool compute = compute_ms >= memory_ms;
  const double floor_ms = std::max(compute_ms, memory_ms), rate = (compute ? work.flops : work.bytes) / (t.median_ms / 1e3);
  print_row(table().family.c_str(), name.c_str(), name_of(dtype), milliseconds(t.median_ms),
            compute ? text("%.1f TFLOP/s", rate / 1e12) : text("%.0f GB/s", rate / 1e9), percent(floor_ms / t.median_ms),
            compute ? "of the product" : "of the copy");
  table().rows.push_back({{"family", table().family}, {"name", name}, {"dtype", name_of(dtype)}, {"flops", work.flops},
                          {"bytes", work.bytes}, {"bound", compute ? "compute" : "memory"}, {"floorMs", floor_ms},
                          {"medianMs", t.median_ms}, {"minMs", t.min_ms}, {"ofFloor", floor_ms / t.median_ms}, {"rate", rate},
                          {"samples", t.samples}, {"callsPerSample", t.calls_per_sample}});
}

}  // namespace

void time_gpu(const std::string& name, Work work, DType dtype, const std::function<void()>& run) {
  if (!row_wanted(name, dtype)) return;
  attempt(table().family + " " + name, [&] { add_timed_row(name, work, dtype, time_calls(run)); });
}

}  // namespace uniflow::test
