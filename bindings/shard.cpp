/// Conversions and statistics for shards, on the host pool, and the lock of their folder.
#include <algorithm>
#include <span>

#include "bindings/define.h"
#include "bindings/ops.h"
#include "native/core/file.h"
#include "native/core/shard.h"

namespace uniflow::bindings {
namespace {

Half half(Napi::Value v) {
  const std::string s = string(v, "type");
  if (s == "float16") return Half::Float16;
  if (s == "bfloat16") return Half::BFloat16;
  throw Error(ErrorCode::BadInput, "type", "'float16' or 'bfloat16'", "'" + s + "'");
}

template <class T>
std::span<T> elements(Napi::Value v, const char* name, DType dtype, const char* expected) {
  const HostArray a = host_array(v, name);
  if (a.dtype != dtype) throw Error(ErrorCode::BadInput, name, expected, name_of(a.dtype));
  return {reinterpret_cast<T*>(a.data), a.bytes / sizeof(T)};
}

std::span<float> wide(Napi::Value v) { return elements<float>(v, "values", DType::Float32, "a Float32Array"); }
std::span<int32_t> whole(Napi::Value v, const char* name) { return elements<int32_t>(v, name, DType::Int32, "an Int32Array"); }
std::span<uint16_t> narrow(Napi::Value v) { return elements<uint16_t>(v, "bits", DType::BFloat16, "a Uint16Array"); }

void check_length(size_t values, size_t bits) {
  if (values != bits) throw Error(ErrorCode::BadInput, "bits", std::to_string(values) + " elements", std::to_string(bits));
}

/// store(values, type, bits)
Napi::Value store(const Info& info) {
  const auto values = wide(info[0]);
  const Half type = half(info[1]);
  const auto bits = narrow(info[2]);
  check_length(values.size(), bits.size());
  auto run = [=](const Run&) { uniflow::store(values, type, bits.data()); };
  return submit_beside(info, "store", run, {info[0], info[2]});
}

/// restore(bits, type, values)
Napi::Value restore(const Info& info) {
  const auto bits = narrow(info[0]);
  const Half type = half(info[1]);
  const auto values = wide(info[2]);
  check_length(values.size(), bits.size());
  auto run = [=](const Run&) { uniflow::restore(bits, type, values.data()); };
  return submit_beside(info, "restore", run, {info[0], info[2]});
}

/// moments(values, channels, mean, squares)
Napi::Value moments(const Info& info) {
  const auto values = wide(info[0]);
  const int64_t channels = integer(info[1], "channels");
  if (channels < 1 || values.empty() || static_cast<int64_t>(values.size()) % channels != 0)
    throw Error(ErrorCode::BadInput, "channels", "a divisor of " + std::to_string(values.size()), std::to_string(channels));
  const auto doubles = [&](Napi::Value v, const char* name) {
    if (!v.IsTypedArray() || v.As<Napi::TypedArray>().TypedArrayType() != napi_float64_array ||
        v.As<Napi::TypedArray>().ElementLength() != static_cast<size_t>(channels))
      throw Error(ErrorCode::BadInput, name, "a Float64Array of " + std::to_string(channels), "something else");
    return v.As<Napi::Float64Array>().Data();
  };
  double* mean = doubles(info[2], "mean");
  double* squares = doubles(info[3], "squares");
  auto run = [=](const Run&) { uniflow::moments(values, channels, mean, squares); };
  return submit_beside(info, "moments", run, {info[0], info[2], info[3]});
}

/// countCodes(codes, groups, counts)
Napi::Value count_codes(const Info& info) {
  const auto codes = whole(info[0], "codes");
  const int64_t groups = integer(info[1], "groups");
  const auto counts = whole(info[2], "counts");
  if (groups < 1 || static_cast<int64_t>(codes.size()) % groups != 0 || static_cast<int64_t>(counts.size()) % groups != 0)
    throw Error(ErrorCode::BadInput, "groups", "a divisor of " + std::to_string(codes.size()) + " and " + std::to_string(counts.size()), std::to_string(groups));
  const auto most = static_cast<int64_t>(counts.size()) / groups;
  if (!std::ranges::all_of(codes, [=](int32_t code) { return code >= 0 && code < most; }))
    throw Error(ErrorCode::BadInput, "codes", "ids from 0 to " + std::to_string(most - 1), "others");
  auto run = [=](const Run&) { uniflow::count_codes(codes, groups, counts); };
  return submit_beside(info, "countCodes", run, {info[0], info[2]});
}

/// lockFile(fd): whether this open file now holds the lock
Napi::Value lock_file(const Info& info) {
  return Napi::Boolean::New(info.Env(), uniflow::lock_file(static_cast<int>(integer(info[0], "fd"))));
}

}  // namespace

void define_shard(Napi::Object exports) {
  define(exports, "store", store);
  define(exports, "restore", restore);
  define(exports, "moments", moments);
  define(exports, "countCodes", count_codes);
  define(exports, "lockFile", lock_file);
}

}  // namespace uniflow::bindings
