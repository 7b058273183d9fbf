#include "bindings/convert.h"

#include <cmath>

namespace uniflow::bindings {
namespace {

std::string kind_of(Napi::Value v) {
  if (v.IsUndefined()) return "undefined";
  if (v.IsNull()) return "null";
  if (v.IsNumber()) return "number " + v.ToString().Utf8Value();
  if (v.IsString()) return "'" + v.As<Napi::String>().Utf8Value() + "'";
  if (v.IsArray()) return "an array";
  if (v.IsFunction()) return "a function";
  if (v.IsObject()) return "an object";
  return "a " + v.ToString().Utf8Value();
}

[[noreturn]] void reject(const char* name, const char* expected, Napi::Value v) {
  throw Error(ErrorCode::BadInput, name, expected, kind_of(v));
}

template <class T, class Array>
std::vector<T> numbers(Napi::Value v, const char* name, napi_typedarray_type type, const char* expected) {
  if (!v.IsTypedArray() || v.As<Napi::TypedArray>().TypedArrayType() != type) reject(name, expected, v);
  const Array a = v.As<Array>();
  return std::vector<T>(a.Data(), a.Data() + a.ElementLength());
}

}  // namespace

int64_t integer(Napi::Value v, const char* name) {
  if (!v.IsNumber()) reject(name, "an integer", v);
  const double d = v.As<Napi::Number>().DoubleValue();
  if (!(std::abs(d) <= 9007199254740991.0) || d != std::floor(d)) reject(name, "an integer", v);
  return static_cast<int64_t>(d);
}

double number(Napi::Value v, const char* name) {
  if (!v.IsNumber() || !std::isfinite(v.As<Napi::Number>().DoubleValue())) reject(name, "a finite number", v);
  return v.As<Napi::Number>().DoubleValue();
}

std::string string(Napi::Value v, const char* name) {
  if (!v.IsString()) reject(name, "a string", v);
  return v.As<Napi::String>().Utf8Value();
}

bool boolean(Napi::Value v, const char* name) {
  if (v.IsUndefined()) return false;
  if (!v.IsBoolean()) reject(name, "true or false", v);
  return v.As<Napi::Boolean>().Value();
}

Shape shape(Napi::Value v, const char* name) {
  const Napi::Array a = array(v, name);
  if (a.Length() > 8) reject(name, "at most 8 dimensions", v);
  Shape s;
  int64_t total = 1;
  for (uint32_t i = 0; i < a.Length(); ++i) {
    const int64_t d = integer(a.Get(i), name);
    if (d < 0 || __builtin_mul_overflow(total, d, &total) || total > (int64_t{1} << 40)) reject(name, "dimensions from 0, up to 2^40 elements", a.Get(i));
    s.push_back(d);
  }
  return s;
}

DType dtype(Napi::Value v, const char* name) {
  const std::string s = string(v, name);
  for (DType d : {DType::Float32, DType::BFloat16, DType::UInt8, DType::Int32, DType::Float8, DType::Int8})
    if (s == name_of(d)) return d;
  reject(name, "'float32', 'bfloat16', 'uint8', 'int32', 'float8' or 'int8'", v);
}

Napi::Object object(Napi::Value v, const char* name) {
  if (!v.IsObject()) reject(name, "an object", v);
  return v.As<Napi::Object>();
}

Napi::Array array(Napi::Value v, const char* name) {
  if (!v.IsArray()) reject(name, "an array", v);
  return v.As<Napi::Array>();
}

std::vector<float> floats(Napi::Value v, const char* name) {
  return numbers<float, Napi::Float32Array>(v, name, napi_float32_array, "a Float32Array");
}

std::vector<uint32_t> uint32s(Napi::Value v, const char* name) {
  return numbers<uint32_t, Napi::Uint32Array>(v, name, napi_uint32_array, "a Uint32Array");
}

uint64_t seed(Napi::Value v, const char* name) {
  const int64_t n = integer(v, name);
  if (n < 0) reject(name, "an integer from 0", v);
  return static_cast<uint64_t>(n);
}

HostArray host_array(Napi::Value v, const char* name) {
  if (!v.IsTypedArray()) reject(name, "a typed array", v);
  // Ask the array, not its buffer: the buffer may be shared memory, which is not an ArrayBuffer.
  napi_typedarray_type kind;
  size_t length;
  void* data;
  napi_value buffer;
  if (napi_get_typedarray_info(v.Env(), v, &kind, &length, &data, &buffer, nullptr) != napi_ok) reject(name, "a typed array", v);
  if (Napi::Object(v.Env(), buffer).Get("resizable").ToBoolean()) reject(name, "an array of fixed length", v);  // a resize could race with a native thread
  DType type;
  switch (kind) {
    case napi_float32_array: type = DType::Float32; break;
    case napi_uint16_array: type = DType::BFloat16; break;
    case napi_uint8_array:
    case napi_uint8_clamped_array: type = DType::UInt8; break;
    case napi_int32_array: type = DType::Int32; break;
    default: reject(name, "a Float32Array, Uint8Array, Int32Array, or Uint16Array of bfloat16 bits", v);
  }
  return {static_cast<std::byte*>(data), length * static_cast<size_t>(size_of(type)), type};
}

Activation activation(Napi::Value v) {
  if (v.IsUndefined()) return Activation::None;
  const std::string s = string(v, "activation");
  if (s == "gelu") return Activation::Gelu;
  if (s == "gelu_tanh") return Activation::GeluTanh;
  if (s == "quick_gelu") return Activation::QuickGelu;
  if (s == "silu") return Activation::Silu;
  throw Error(ErrorCode::BadInput, "activation", "'gelu', 'gelu_tanh', 'quick_gelu' or 'silu'", "'" + s + "'");
}

}  // namespace uniflow::bindings
