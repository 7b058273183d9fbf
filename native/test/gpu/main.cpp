/// uniflow_gpu_check: the GPU's kernels against the CPU's and against the reference, and how fast they are. Needs the driver and
/// cuBLASLt, and no Node.
#include <sys/stat.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <fstream>
#include <optional>
#include <regex>

#include "native/core/device.h"
#include "native/cuda/runtime.h"
#include "native/test/gpu/timing.h"

#ifndef UNIFLOW_COMMIT
#define UNIFLOW_COMMIT "unknown"
#endif

namespace uniflow::test {
namespace {

constexpr const char* kUsage = R"(uniflow_gpu_check [--check] [--bench] [--filter REGEX] [--json FILE] [--golden DIR]

Checks every kernel of the GPU against the CPU's and against the reference's values, then times them.

  --check         only the checks
  --bench         only the benchmark
  --filter REGEX  only checks whose family matches, and rows whose 'family kernel dtype' matches
  --json FILE     write the device, the yardsticks and the rows to a file, again after each family
  --golden DIR    where the reference's values are (default: test/fixtures/golden, from the repository's root)
  --help          this text

Exit status: 0 all well, 1 a check failed, 2 bad usage, 3 no usable GPU.
)";
constexpr const char* kGolden = "test/fixtures/golden";
constexpr double kMostDrift = 0.1;

struct Options {
  bool check = false, bench = false;
  std::optional<std::regex> filter;
  std::string json, golden;
};

struct Family {
  const char* name;
  void (*check)();
  void (*bench)();
};

constexpr Family kFamilies[] = {
    {"linear", check_linear, bench_linear},
    {"attention", check_attention, bench_attention},
    {"attention_backward", check_attention_backward, bench_attention_backward},
    {"norm", check_norm, bench_norm},
    {"patch", check_patch, bench_patch},
    {"elementwise", check_elementwise, bench_elementwise},
    {"random", check_random, bench_random},
    {"residual", check_residual, bench_residual},
    {"flow", check_flow, bench_flow},
    {"flow_loss", check_flow_loss, bench_flow_loss},
    {"distillation", check_distillation, bench_distillation},
    {"codes", check_codes, bench_codes},
    {"cross_entropy", check_cross_entropy, bench_cross_entropy},
    {"optimizer", check_optimizer, bench_optimizer},
    {"statistics", check_statistics, bench_statistics},
    {"quality", check_quality, bench_quality},
    {"encoder", nullptr, bench_encoder},
    {"probe", nullptr, bench_probe},
    {"memory", check_memory, nullptr},
    {"upload", check_upload, bench_upload},
};

[[noreturn]] void bad_usage(const std::string& why) {
  std::fprintf(stderr, "uniflow_gpu_check: %s\n\n%s", why.c_str(), kUsage);
  std::exit(2);
}

std::regex to_regex(const std::string& text) {
  try {
    return std::regex(text, std::regex::ECMAScript | std::regex::icase);
  } catch (const std::regex_error& e) {
    bad_usage("--filter: " + std::string(e.what()));
  }
}

Options parse(int count, char** arguments) {
  Options o;
  for (int i = 1; i < count; ++i) {
    const std::string name = arguments[i];
    auto value = [&] {
      if (++i == count) bad_usage(name + " needs a value");
      return std::string(arguments[i]);
    };
    if (name == "--check") o.check = true;
    else if (name == "--bench") o.bench = true;
    else if (name == "--filter") o.filter = to_regex(value());
    else if (name == "--json") o.json = value();
    else if (name == "--golden") o.golden = value();
    else if (name == "--help") std::printf("%s", kUsage), std::exit(0);
    else bad_usage("unknown option " + name);
  }
  if (!o.check && !o.bench) o.check = o.bench = true;
  return o;
}

bool matches(const Options& o, const std::string& name) { return !o.filter || std::regex_search(name, *o.filter); }

/// After some errors nothing works until the process is started again.
bool device_works() {
  return error_code([] { DeviceArray(DType::Float32, 1).host(); }) == "nothing";
}

/// False where the device is lost.
bool run(const char* name, const std::function<void()>& body) {
  try {
    body();
  } catch (const std::exception& e) {
    check(false, name, e.what());
    if (!device_works()) {
      std::printf("The GPU does not work any more; the rest is left out.\n");
      return false;
    }
  }
  return true;
}

bool run_golden(const Options& o) {
  const std::string folder = o.golden.empty() ? kGolden : o.golden;
  struct stat found {};
  if (o.golden.empty() && stat(folder.c_str(), &found) != 0) {
    std::printf("\n-- golden: left out, there is no %s here (--golden DIR)\n", kGolden);
    return true;
  }
  std::printf("\n-- golden\n");
  return run("golden", [&] { check_golden(folder); });
}

std::string now() {
  const std::time_t t = std::time(nullptr);
  char out[32];
  std::strftime(out, sizeof out, "%FT%TZ", std::gmtime(&t));
  return out;
}

/// The CUDA version that the driver supports.
std::string driver() {
  int version = 0;
  cuda::check(cudaDriverGetVersion(&version), "cudaDriverGetVersion");
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

/// The results so far, rewritten after each family, so that an early end of the process loses at most one family.
class Report {
 public:
  Report(std::string path, const std::string& device)
      : path_(std::move(path)),
        report_({{"date", now()}, {"device", device}, {"driver", "CUDA " + driver()}, {"commit", UNIFLOW_COMMIT}, {"emulated", emulated()}}) {}

  void set(const std::string& name, nlohmann::json value) { report_[name] = std::move(value); }

  void write(bool complete = false) {
    if (path_.empty()) return;
    set("complete", complete);
    set("rows", table_rows());
    set("checks", {{"passed", passed}, {"failed", failed}});
    const std::string part = path_ + ".part";
    std::ofstream file(part);
    file << report_.dump(2) << "\n";
    file.close();
    if (!file || std::rename(part.c_str(), path_.c_str()) != 0) check(false, "writing " + path_);
  }

 private:
  std::string path_;
  nlohmann::json report_;
};

bool run_checks(const Options& o, Report& report) {
  for (const Family& family : kFamilies) {
    if (!family.check || !matches(o, family.name)) continue;
    std::printf("\n-- %s\n", family.name);
    const bool works = run(family.name, family.check);
    report.write();
    if (!works) return false;
  }
  return !matches(o, "golden") || run_golden(o);
}

/// The yardsticks before and after: where they differ, something else ran, or the GPU became too warm.
void run_bench(const Options& o, Report& report) {
  const Yardsticks before = measure_yardsticks();
  report.set("yardsticks", {{"before", to_json(before)}});
  std::printf("\nYardsticks: %s\n", to_text(before).c_str());
  if (emulated()) std::printf("Emulated: the times below mean nothing.\n");
  begin_table(before, [&](const std::string& row) { return matches(o, row); });
  for (const Family& family : kFamilies) {
    if (!family.bench) continue;
    begin_family(family.name);
    const bool works = run(family.name, family.bench);
    report.write();
    if (!works) return;
  }
  const Yardsticks after = measure_yardsticks();
  const double drift = std::max({std::abs(after.bfloat16 / before.bfloat16 - 1), std::abs(after.float32 / before.float32 - 1),
                                 std::abs(after.copy / before.copy - 1)});
  std::printf("Yardsticks after: %s\n", to_text(after).c_str());
  std::printf("Above 100 %%: the operands stayed in the GPU's cache from one call to the next.\n");
  if (drift > kMostDrift && !emulated())
    std::printf("WARNING: the yardsticks moved by %.0f %%: the figures are not to be trusted.\n", 100 * drift);
  report.set("yardsticks", {{"before", to_json(before)}, {"after", to_json(after)}, {"drift", drift}});
}

int main(const Options& o) {
  std::string device;
  try {
    device = gpu_device().backend().description();
  } catch (const Error& e) {
    std::fprintf(stderr, "uniflow_gpu_check: %s\n", e.what());
    return 3;
  }
  std::printf("%s\n%s, commit %s\n", device.c_str(), now().c_str(), UNIFLOW_COMMIT);
  Report report(o.json, device);
  const bool works = !o.check || run_checks(o, report);
  if (o.check) std::printf("\n%d passed, %d failed\n", passed, failed);
  if (o.bench && works) run("yardsticks", [&] { run_bench(o, report); });
  report.write(works);
  return failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace uniflow::test

int main(int count, char** arguments) { return uniflow::test::main(uniflow::test::parse(count, arguments)); }
