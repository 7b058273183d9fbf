/// Argument checks of every op, on the caller's thread, before anything is queued.
#pragma once

#include <initializer_list>
#include <string>

#include "native/core/device.h"
#include "native/ops/kernels.h"

namespace uniflow::ops {

[[noreturn]] inline void reject(const std::string& subject, const std::string& expected, const std::string& actual) {
  throw Error(ErrorCode::BadInput, subject, expected, actual);
}

inline std::string describe(const Tensor& t) {
  if (!t) return "nothing";
  return std::string(name_of(t.dtype())) + " " + to_string(t.shape()) + (t.packing() ? " (packed)" : "");
}

/// A plain (not packed) tensor of this shape; -1 matches any size.
inline void check_shape(const Tensor& t, const char* name, const Shape& shape) {
  bool ok = t && !t.packing() && t.shape().size() == shape.size();
  for (size_t i = 0; ok && i < shape.size(); ++i) ok = shape[i] < 0 || shape[i] == t.shape()[i];
  if (!ok) reject(name, "a tensor " + to_string(shape), describe(t));
}

inline void check_dtype(const Tensor& t, const char* name, std::initializer_list<DType> allowed) {
  if (!t) reject(name, "a tensor", "nothing");
  std::string names;
  for (DType d : allowed) {
    if (t.dtype() == d) return;
    names += (names.empty() ? "" : " or ") + std::string(name_of(d));
  }
  reject(name, names, describe(t));
}

inline void check_floating(const Tensor& t, const char* name) { check_dtype(t, name, {DType::Float32, DType::BFloat16}); }

/// A float32 vector [n], or absent.
inline void check_optional_vector(const Tensor& t, const char* name, int64_t n) {
  if (!t) return;
  check_shape(t, name, {n});
  check_dtype(t, name, {DType::Float32});
}

inline void check_positive(int64_t n, const char* name) {
  if (n <= 0) reject(name, "a positive integer", std::to_string(n));
}

/// Size of a patch grid, limited so that no product of sizes overflows.
inline void check_grid(int64_t rows, int64_t cols) {
  constexpr int64_t kMost = int64_t{1} << 20;
  for (int64_t n : {rows, cols})
    if (n < 1 || n > kMost) reject("grid", "rows and columns from 1 to 2^20", std::to_string(rows) + " x " + std::to_string(cols));
}

/// Queues a command on the device of its tensors.
inline void enqueue(const std::shared_ptr<Session>& session, Command command) {
  for (const auto* tensors : {&command.outputs, &command.inputs})
    for (const Tensor& t : *tensors)
      if (t) return t.device().stream().enqueue(session, std::move(command));
}

inline const float* float_data(const Tensor& t) { return t ? t.data<float>() : nullptr; }
inline const void* raw_data(const Tensor& t) { return t ? t.data<void>() : nullptr; }

}  // namespace uniflow::ops
