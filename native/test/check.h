/// Shared by the native tests: one printed line per case, typed arrays of exactly their size, tensors to and from
/// vectors, and the names of errors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <future>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "native/core/device.h"

namespace uniflow::test {

inline int passed = 0, failed = 0;

inline void check(bool ok, const std::string& name, const std::string& detail = "") {
  ++(ok ? passed : failed);
  std::printf("%s %s%s%s\n", ok ? "ok  " : "FAIL", name.c_str(), detail.empty() ? "" : ": ", detail.c_str());
  std::fflush(stdout);  // before whatever the next case crashes on
}

inline std::string text(const char* format, double value) {
  char out[64];
  std::snprintf(out, sizeof out, format, value);
  return out;
}

inline void check_below(double error, double floor, const std::string& name) {
  check(error <= floor, name, "error " + text("%.2e", error) + ", floor " + text("%.0e", floor));
}

/// Values of float32, bfloat16 or uint8 in exactly their bytes on the heap, so that the address sanitizer sees a read or
/// write past the end.
class Array {
 public:
  Array(DType dtype, int64_t n) : dtype_(dtype), n_(n), bytes_(zeros(n * size_of(dtype))) {}
  Array(DType dtype, int64_t n, double value) : Array(dtype, n) {
    for (int64_t i = 0; i < n; ++i) set(i, value);
  }
  Array(DType dtype, const std::vector<float>& values) : Array(dtype, static_cast<int64_t>(values.size())) {
    for (int64_t i = 0; i < n_; ++i) set(i, values[static_cast<size_t>(i)]);
  }

  DType dtype() const { return dtype_; }
  int64_t size() const { return n_; }
  void* data() const { return bytes_.get(); }
  float* floats() const { return reinterpret_cast<float*>(bytes_.get()); }
  uint8_t* bytes() const { return reinterpret_cast<uint8_t*>(bytes_.get()); }

  double operator[](int64_t i) const {
    if (dtype_ == DType::UInt8) return bytes()[i];
    return double{dtype_ == DType::BFloat16 ? to_float(reinterpret_cast<bf16*>(bytes_.get())[i]) : floats()[i]};
  }
  void set(int64_t i, double value) {
    if (dtype_ == DType::UInt8) bytes()[i] = static_cast<uint8_t>(value);
    else if (dtype_ == DType::BFloat16) reinterpret_cast<bf16*>(bytes_.get())[i] = to_bf16(static_cast<float>(value));
    else floats()[i] = static_cast<float>(value);
  }
  bool operator==(const Array& o) const {
    return n_ == o.n_ && std::memcmp(data(), o.data(), static_cast<size_t>(n_ * size_of(dtype_))) == 0;
  }

 private:
  /// Not inlined: GCC 12 warns of negative sizes that it imagines where it is.
  [[gnu::noinline]] static std::unique_ptr<std::byte[]> zeros(int64_t bytes) { return std::make_unique<std::byte[]>(static_cast<size_t>(bytes)); }

  DType dtype_;
  int64_t n_;
  std::unique_ptr<std::byte[]> bytes_;
};

/// Normal numbers, the same in every run.
inline std::vector<float> normal(int64_t n, unsigned seed, float deviation = 1, float mean = 0) {
  std::mt19937 random(seed);
  std::normal_distribution<float> draw(mean, deviation);
  std::vector<float> out(static_cast<size_t>(n));
  for (float& v : out) v = draw(random);
  return out;
}

/// The largest |got - want| / (1 + |want|); infinite where either is not finite.
inline double worst(const Array& got, const std::vector<double>& want) {
  if (got.size() != static_cast<int64_t>(want.size())) return std::numeric_limits<double>::infinity();
  double error = 0;
  for (int64_t i = 0; i < got.size(); ++i) {
    const double w = want[static_cast<size_t>(i)], e = std::abs(got[i] - w) / (1 + std::abs(w));
    if (!(e <= error)) error = std::isfinite(e) ? e : std::numeric_limits<double>::infinity();
  }
  return error;
}

/// Half a unit in the last place of `dtype`, relative, with `slack` units of float32 for the arithmetic before it.
inline double floor_of(DType dtype, double slack) { return (dtype == DType::BFloat16 ? 0x1p-8 : 0) + slack * 0x1p-24; }

using SessionRef = std::shared_ptr<Session>;

inline SessionRef session() { return std::make_shared<Session>(); }

/// A session whose commands never run: for tests of what an op refuses before it queues anything.
inline SessionRef idle_session() {
  auto s = session();
  auto token = std::make_shared<CancelToken>();
  token->cancel();
  s->set_token(token);
  return s;
}

/// Waits for the tensor, and returns why it failed, or null.
inline std::shared_ptr<const Error> wait(const Tensor& t) {
  auto ended = std::make_shared<std::promise<std::shared_ptr<const Error>>>();
  auto result = ended->get_future();
  Device::cpu().stream().enqueue(session(), {"wait", {t}, {}, [](const Run&) {}, [ended](std::shared_ptr<const Error> e) { ended->set_value(std::move(e)); }});
  return result.get();
}

/// The last line of a test, and its exit status. Work that is still queued would run into the end of the process.
inline int finish() {
  wait({});
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}

inline Tensor to_tensor(const Array& values, Shape shape) {
  Tensor t(values.dtype(), std::move(shape));
  t.buffer()->allocate();
  std::memcpy(t.data(), values.data(), static_cast<size_t>(t.bytes()));
  return t;
}
inline Tensor to_tensor(DType dtype, Shape shape, const std::vector<float>& values) { return to_tensor(Array(dtype, values), std::move(shape)); }

/// Waits for the tensor and copies it. One that failed is a failed case, and zeros.
inline Array to_array(const Tensor& t) {
  Array out(t.dtype(), t.size());
  const auto failure = wait(t);
  if (failure) check(false, "a tensor to look at", failure->what());
  else std::memcpy(out.data(), t.data(), static_cast<size_t>(t.bytes()));
  return out;
}

/// The code of the Error that `body` throws, "nothing", or what it threw instead.
template <class Body>
std::string error_code(Body&& body) {
  try {
    body();
    return "nothing";
  } catch (const Error& e) {
    return name_of(e.code);
  } catch (const std::exception& e) {
    return std::string("another exception: ") + e.what();
  }
}

template <class Body>
void check_refused(const std::string& name, Body&& body) {
  const std::string code = error_code(body);
  check(code == "BAD_INPUT", "refuses " + name, code);
}

}  // namespace uniflow::test
