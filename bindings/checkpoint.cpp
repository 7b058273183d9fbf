/// Safetensors files and loading parameters from them.
#include <algorithm>

#include "bindings/define.h"
#include "bindings/ops.h"
#include "native/ops/load.h"

namespace uniflow::bindings {
namespace {

constexpr napi_type_tag kFileTag = {0x1c9d3b7a44e84f02, 0xa5b27f61d0c39e84};
using FileRef = std::shared_ptr<SafetensorsFile>;

FileRef file_of(Napi::Value v) {
  if (!v.IsExternal() || !v.As<Napi::External<FileRef>>().CheckTypeTag(&kFileTag))
    throw Error(ErrorCode::BadInput, "file", "an open safetensors file", "something else");
  return *v.As<Napi::External<FileRef>>().Data();
}

/// { handle, metadata, tensors: { name: { dtype, shape } } }
Napi::Value describe(Napi::Env env, FileRef file) {
  auto tensors = Napi::Object::New(env), metadata = Napi::Object::New(env), out = Napi::Object::New(env);
  for (const auto& [name, entry] : file->entries()) {
    auto shape = Napi::Array::New(env, entry.shape.size());
    for (uint32_t i = 0; i < entry.shape.size(); ++i) shape[i] = Napi::Number::New(env, static_cast<double>(entry.shape[i]));
    auto item = Napi::Object::New(env);
    item["dtype"] = Napi::String::New(env, name_of(entry.dtype));
    item["shape"] = shape;
    tensors[name] = item;
  }
  for (const auto& [key, value] : file->metadata()) metadata[key] = Napi::String::New(env, value);
  auto handle = Napi::External<FileRef>::New(env, new FileRef(std::move(file)), [](Napi::Env, FileRef* ref) { delete ref; });
  handle.TypeTag(&kFileTag);
  out["handle"] = handle;
  out["metadata"] = metadata;
  out["tensors"] = tensors;
  return out;
}

std::vector<ops::ParameterPart> parts(Napi::Value v) {
  const Napi::Array a = array(v, "parts");
  std::vector<ops::ParameterPart> out;
  for (uint32_t i = 0; i < a.Length(); ++i) {
    const Napi::Object o = object(a.Get(i), "part");
    if (o.Has("file")) out.push_back({file_of(o["file"]), string(o["name"], "name"), 0});
    else out.push_back({nullptr, "", integer(o["rows"], "rows")});
  }
  return out;
}

}  // namespace

void define_checkpoint(Napi::Object exports) {
  define(exports, "openSafetensors", [](const Info& i) { return describe(i.Env(), SafetensorsFile::open(string(i[0], "path"))); });
  define(exports, "tensorBytes", [](const Info& i) -> Napi::Value {
    const FileRef file = file_of(i[0]);
    const auto found = file->entries().find(string(i[1], "name"));
    if (found == file->entries().end()) throw Error(ErrorCode::BadCheckpoint, file->path(), "the tensor " + string(i[1], "name"), "none");
    auto out = Napi::Uint8Array::New(i.Env(), found->second.bytes);
    std::copy_n(reinterpret_cast<const uint8_t*>(found->second.data), found->second.bytes, out.Data());
    return out;
  });
  define(exports, "loadParameter", [](const auto& s, const Info& i) {
    return ops::load_parameter(s, parts(i[0]), shape(i[1], "shape"), dtype(i[2], "dtype"), boolean(i[3], "packed"));
  });
  define(exports, "parameterBytes",
         [](const auto& s, const Info& i) { return ops::parameter_bytes(s, tensor(i[0], "parameter"), dtype(i[1], "dtype")); });
  define(exports, "parameterScales", [](const auto& s, const Info& i) { return ops::parameter_scales(s, tensor(i[0], "weight")); });
  define(exports, "copyParameter",
         [](const auto& s, const Info& i) { return ops::copy_parameter(s, tensor(i[0], "parameter"), dtype(i[1], "dtype")); });
  define(exports, "randomParameter", [](const auto& s, const Info& i) {
    return ops::random_parameter(s, shape(i[0], "shape"), dtype(i[1], "dtype"), boolean(i[2], "packed"), seed(i[3], "seed"),
                                 static_cast<uint32_t>(integer(i[4], "stream")), static_cast<float>(number(i[5], "std")));
  });
  define(exports, "constantParameter", [](const auto& s, const Info& i) {
    return ops::constant_parameter(s, shape(i[0], "shape"), static_cast<float>(number(i[1], "value")));
  });
}

}  // namespace uniflow::bindings
