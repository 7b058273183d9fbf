#include "native/ops/load.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "native/core/half.h"
#include "native/core/parallel.h"
#include "native/core/philox.h"
#include "native/ops/check.h"

namespace uniflow::ops {
namespace {

template <class T>
T read_at(const std::byte* p, int64_t i) {  // the format does not align its data
  T v;
  std::memcpy(&v, p + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return v;
}

float element(const SafetensorsFile::Entry& e, int64_t i) {
  switch (e.dtype) {
    case FileDType::F32: return read_at<float>(e.data, i);
    case FileDType::BF16: return to_float(bf16{read_at<uint16_t>(e.data, i)});
    default: return half_to_float(read_at<uint16_t>(e.data, i));
  }
}

const SafetensorsFile::Entry& entry_of(const ParameterPart& part) {
  const auto& entries = part.file->entries();
  auto it = entries.find(part.name);
  if (it == entries.end()) throw Error(ErrorCode::BadCheckpoint, part.name, "a tensor in " + part.file->path(), "none of that name");
  const auto& e = it->second;
  if (e.dtype != FileDType::F32 && e.dtype != FileDType::BF16 && e.dtype != FileDType::F16 && e.dtype != FileDType::I8)
    throw Error(ErrorCode::BadCheckpoint, part.name, "F32, F16, BF16 or I8", name_of(e.dtype));
  return e;
}

/// The scales of an I8 tensor's rows.
const SafetensorsFile::Entry& scales_of(const ParameterPart& part, int64_t rows) {
  const ParameterPart scales{part.file, part.name + "_scale"};
  const auto& e = entry_of(scales);
  if (e.dtype != FileDType::F32 || count(e.shape) != rows)
    throw Error(ErrorCode::BadCheckpoint, scales.name, std::to_string(rows) + " elements of F32", to_string(e.shape) + " of " + name_of(e.dtype));
  return e;
}

int64_t elements(const ParameterPart& part, int64_t row) {
  if (part.file) {
    const auto& e = entry_of(part);
    if (e.dtype == FileDType::I8) scales_of(part, e.shape.empty() ? 1 : e.shape[0]);
    return count(e.shape);
  }
  int64_t n;
  if (part.rows < 0 || __builtin_mul_overflow(part.rows, row, &n)) reject("rows", "a number of rows", std::to_string(part.rows));
  return n;
}

/// Writes value(i) for i in [begin, end) as `dtype`.
template <class Value>
void write(int64_t begin, int64_t end, DType dtype, std::byte* out, Value&& value) {
  for (int64_t i = begin; i < end; ++i) {
    if (dtype == DType::BFloat16) reinterpret_cast<bf16*>(out)[i] = to_bf16(value(i));
    else reinterpret_cast<float*>(out)[i] = value(i);
  }
}

void read_part(const ParameterPart& part, int64_t n, DType dtype, std::byte* out) {
  if (!part.file) {
    std::memset(out, 0, static_cast<size_t>(n * size_of(dtype)));
    return;
  }
  const auto& e = entry_of(part);
  const bool same = (e.dtype == FileDType::F32 && dtype == DType::Float32) || (e.dtype == FileDType::BF16 && dtype == DType::BFloat16);
  if (same) {
    std::memcpy(out, e.data, e.bytes);
  } else if (e.dtype == FileDType::I8) {
    const int64_t rows = e.shape.empty() ? 1 : e.shape[0];
    const auto& scales = scales_of(part, rows);
    parallel_for(rows, [&](int64_t r) {
      const float scale = read_at<float>(scales.data, r);
      write(r * (n / rows), (r + 1) * (n / rows), dtype, out, [&](int64_t i) { return static_cast<float>(read_at<int8_t>(e.data, i)) * scale; });
    });
  } else {
    parallel_chunks(n, [&](int64_t begin, int64_t end) { write(begin, end, dtype, out, [&](int64_t i) { return element(e, i); }); });
  }
  part.file->release(e);
}

Tensor make_parameter(Device& device, const Shape& shape, DType dtype, bool packed) {
  if (!packed) return Tensor(device, dtype, shape, Placement::Persistent);
  if (shape.size() != 2 || count(shape) == 0) reject("shape", "[out, in] of a linear weight", to_string(shape));
  const auto packing = device.kernels().linear_packing(shape[0], shape[1], dtype);
  return Tensor(device, dtype, shape, packing, device.kernels().packed_bytes(*packing));
}

/// The type of a parameter before it is packed.
DType plain_dtype(DType dtype) { return dtype == DType::Float8 ? DType::BFloat16 : dtype == DType::Int8 ? DType::Float32 : dtype; }

void check_parameter_dtype(DType dtype, bool packed) {
  if (dtype == DType::Float32 || dtype == DType::BFloat16 || ((dtype == DType::Float8 || dtype == DType::Int8) && packed)) return;
  reject("dtype", packed ? "float32, bfloat16, float8 or int8" : "float32 or bfloat16", name_of(dtype));
}

Tensor allocated(Tensor t) {
  t.buffer()->allocate();
  return t;
}

/// Runs `fill(plain)` directly on a plain parameter's CPU memory; otherwise on staging memory, which is then uploaded or packed.
template <class Fill>
void fill_parameter(const Run& run, const Tensor& out, DType plain, Fill&& fill) {
  Device& device = out.device();
  if (device.is_cpu() && !out.packing()) {
    fill(out.data<std::byte>());
    return;
  }
  const Tensor staged = allocated(Tensor(device, plain, out.shape(), Placement::Staging));
  fill(staged.data<std::byte>());
  if (!out.packing()) {
    run.backend.upload(out, staged);
    return;
  }
  Tensor source = staged;
  if (!device.is_cpu()) {
    source = allocated(Tensor(device, plain, out.shape(), Placement::Transfer));
    run.backend.upload(source, staged);
  }
  run.kernels.pack(*out.packing(), source.data(), plain, out.data());
}

}  // namespace

Tensor load_parameter(const SessionRef& session, const std::vector<ParameterPart>& parts, const Shape& shape, DType dtype, bool packed) {
  check_parameter_dtype(dtype, packed);
  const Tensor out = make_parameter(session->device(), shape, dtype, packed);
  const DType plain_type = plain_dtype(dtype);
  const int64_t row = shape.empty() || shape[0] == 0 ? 1 : count(shape) / shape[0];
  int64_t total = 0;
  for (const ParameterPart& part : parts) total += elements(part, row);
  if (total != count(shape)) {
    const std::string name = parts.empty() ? "parameter" : parts.front().name;
    throw Error(ErrorCode::BadCheckpoint, name, std::to_string(count(shape)) + " elements for " + to_string(shape), std::to_string(total));
  }
  enqueue(session, {"loadParameter", {}, {out}, [=](const Run& run) {
    fill_parameter(run, out, plain_type, [&](std::byte* plain) {
      for (const ParameterPart& part : parts) {
        const int64_t n = elements(part, row);
        read_part(part, n, plain_type, plain);
        plain += n * size_of(plain_type);
      }
    });
  }});
  return out;
}

namespace {

/// Element i of a normal distribution truncated at two standard deviations, by redrawing values outside.
float truncated_normal(uint64_t seed, uint32_t stream, int64_t i) {
  const auto block = static_cast<uint64_t>(i / 4);
  for (uint32_t attempt = 0;; ++attempt) {
    const auto four = philox_normal(philox({static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), stream, (attempt << 2) | 1}, seed));
    const float v = four[static_cast<size_t>(i % 4)];
    if (std::abs(v) <= 2) return v;
  }
}

}  // namespace

Tensor random_parameter(const SessionRef& session, const Shape& shape, DType dtype, bool packed, uint64_t seed, uint32_t stream, float std) {
  check_parameter_dtype(dtype, packed);
  const Tensor out = make_parameter(session->device(), shape, dtype, packed);
  const DType plain_type = plain_dtype(dtype);
  enqueue(session, {"randomParameter", {}, {out}, [=](const Run& run) {
    fill_parameter(run, out, plain_type, [&](std::byte* plain) {
      parallel_for(count(shape), [&](int64_t i) {
        const float v = std * truncated_normal(seed, stream, i);
        if (plain_type == DType::BFloat16) reinterpret_cast<bf16*>(plain)[i] = to_bf16(v);
        else reinterpret_cast<float*>(plain)[i] = v;
      });
    });
  }});
  return out;
}

Tensor constant_parameter(const SessionRef& session, const Shape& shape, float value) {
  Tensor out(session->device(), DType::Float32, shape, Placement::Persistent);
  enqueue(session, {"constantParameter", {}, {out}, [=](const Run& run) {
    run.kernels.fill(out.data<float>(), value, out.size());
  }});
  return out;
}

namespace {

/// The values in C order as `dtype`.
void copy_values(const Run& run, const Tensor& parameter, DType dtype, void* out) {
  if (parameter.packing()) run.kernels.unpack(*parameter.packing(), parameter.data(), out, dtype);
  else run.kernels.cast(parameter.data(), parameter.dtype(), out, dtype, parameter.size());
}

void check_copy(const Tensor& parameter, DType dtype) {
  if (!parameter.packing()) check_floating(parameter, "parameter");
  if (dtype != DType::Float32 && dtype != DType::BFloat16) reject("dtype", "float32 or bfloat16", name_of(dtype));
}

}  // namespace

Tensor copy_parameter(const SessionRef& session, const Tensor& parameter, DType dtype) {
  check_copy(parameter, dtype);
  Tensor out(parameter.device(), dtype, parameter.shape(), Placement::Persistent);
  enqueue(session, {"copyParameter", {parameter}, {out}, [=](const Run& run) { copy_values(run, parameter, dtype, out.data()); }});
  return out;
}

Tensor parameter_bytes(const SessionRef& session, const Tensor& parameter, DType dtype) {
  if (dtype != DType::Int8 || parameter.dtype() != DType::Int8) check_copy(parameter, dtype);
  Tensor out(parameter.device(), DType::UInt8, {parameter.size() * size_of(dtype)});
  enqueue(session, {"parameterBytes", {parameter}, {out}, [=](const Run& run) { copy_values(run, parameter, dtype, out.data()); }});
  return out;
}

Tensor parameter_scales(const SessionRef& session, const Tensor& weight) {
  if (!weight || weight.dtype() != DType::Int8) reject("weight", "an int8 weight", describe(weight));
  Tensor out(weight.device(), DType::Float32, {weight.dim(0)});
  enqueue(session, {"parameterScales", {weight}, {out}, [=](const Run& run) {
    const Tensor floats = allocated(Tensor(weight.device(), DType::Float32, weight.shape()));
    run.kernels.unpack(*weight.packing(), weight.data(), floats.data(), DType::Float32);
    const int64_t in = weight.dim(1);
    parallel_for(weight.dim(0), [&](int64_t r) {  // a row that is not zero contains 127 or -127 times its scale
      float largest = 0;
      for (int64_t i = r * in; i < (r + 1) * in; ++i) largest = std::max(largest, std::abs(floats.data<float>()[i]));
      out.data<float>()[r] = largest / 127;
    });
  }});
  return out;
}

}  // namespace uniflow::ops
