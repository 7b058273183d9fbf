/// Conversions from JavaScript values to native ones. Every argument passes through one of these; an invalid one throws a BAD_INPUT that
/// names it.
#pragma once

#include <napi.h>

#include <string>
#include <vector>

#include "native/core/activation.h"
#include "native/core/tensor.h"

namespace uniflow::bindings {

Tensor tensor(Napi::Value value, const char* name);
Tensor optional_tensor(Napi::Value value, const char* name);  // undefined and null give an empty Tensor
int64_t integer(Napi::Value value, const char* name);
double number(Napi::Value value, const char* name);
std::string string(Napi::Value value, const char* name);
bool boolean(Napi::Value value, const char* name);  // undefined is false
Shape shape(Napi::Value value, const char* name);
DType dtype(Napi::Value value, const char* name);
Activation activation(Napi::Value value);  // undefined is None
Napi::Object object(Napi::Value value, const char* name);
Napi::Array array(Napi::Value value, const char* name);
std::vector<float> floats(Napi::Value value, const char* name);
std::vector<uint32_t> uint32s(Napi::Value value, const char* name);
uint64_t seed(Napi::Value value, const char* name);  // a non-negative integer up to 2^53

/// A typed array (also from another realm) as bytes with their element type.
struct HostArray {
  std::byte* data;
  size_t bytes;
  DType dtype;
};
HostArray host_array(Napi::Value value, const char* name);

/// The JavaScript handle of a tensor.
Napi::Value wrap(Napi::Env env, const Tensor& tensor);
void define_tensor_class(Napi::Env env, Napi::Object exports);
int64_t live_handles();

}  // namespace uniflow::bindings
