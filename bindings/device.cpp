/// Threads, memory, cancellation, and what the machine can do.
#include <cstring>

#include "bindings/convert.h"
#include "bindings/env.h"
#include "bindings/ops.h"
#include "native/cpu/kernels.h"
#include "native/cpu/linear.h"

namespace uniflow::bindings {
namespace {

constexpr napi_type_tag kTokenTag = {0x5e0b8d1f9a2c4763, 0xb1d4e6f8a0927c35};
using TokenRef = std::shared_ptr<CancelToken>;

TokenRef token_of(Napi::Value v) {
  if (!v.IsExternal() || !v.As<Napi::External<TokenRef>>().CheckTypeTag(&kTokenTag))
    throw Error(ErrorCode::BadInput, "token", "a cancellation token", "something else");
  return *v.As<Napi::External<TokenRef>>().Data();
}

Napi::Value create_token(const Napi::CallbackInfo& info) {
  auto handle = Napi::External<TokenRef>::New(info.Env(), new TokenRef(std::make_shared<CancelToken>()), [](Napi::Env, TokenRef* t) { delete t; });
  handle.TypeTag(&kTokenTag);
  return handle;
}

Napi::Value memory_stats(const Napi::CallbackInfo& info) {
  const MemoryStats s = Allocator::host().stats();
  auto out = Napi::Object::New(info.Env());
  auto put = [&](const char* name, int64_t v) { out[name] = Napi::Number::New(info.Env(), static_cast<double>(v)); };
  put("active", s.active);
  put("peak", s.peak);
  put("pool", s.pool);
  put("handles", live_handles());
  return out;
}

Napi::Value cpu_info(const Napi::CallbackInfo& info) {
  auto out = Napi::Object::New(info.Env());
  out["kernels"] = Napi::String::New(info.Env(), cpu::kernels().name);
  out["linear"] = Napi::String::New(info.Env(), cpu::linear_backend());
  out["nativeBfloat16"] = Napi::Boolean::New(info.Env(), cpu::native_bfloat16());
  out["threads"] = Napi::Number::New(info.Env(), Stream::cpu().threads());
  out["defaultThreads"] = Napi::Number::New(info.Env(), default_threads());
  return out;
}

/// measurePeak(into): Float64Array of [bfloat16 FLOP/s, float32 FLOP/s, copied bytes/s], measured on the stream.
Napi::Value measure_peak(const Napi::CallbackInfo& info) {
  if (!info[0].IsTypedArray() || info[0].As<Napi::TypedArray>().TypedArrayType() != napi_float64_array ||
      info[0].As<Napi::TypedArray>().ElementLength() != 3)
    throw Error(ErrorCode::BadInput, "into", "a Float64Array of 3", "something else");
  double* into = info[0].As<Napi::Float64Array>().Data();
  auto run = [into](const CancelToken&) {
    into[0] = cpu::kernels().fma_peak(DType::BFloat16);
    into[1] = cpu::kernels().fma_peak(DType::Float32);
    Tensor from(DType::UInt8, {256 << 20}), to(DType::UInt8, {256 << 20});
    for (Tensor* t : {&from, &to}) {
      t->buffer()->allocate();
      std::memset(t->data(), 1, static_cast<size_t>(t->bytes()));
    }
    into[2] = cpu::kernels().copy_rate(to.data(), from.data(), from.bytes());
  };
  return Environment::of(info.Env()).submit({"measurePeak", {}, {}, run}, info[0].As<Napi::Object>());
}

}  // namespace

void define_device(Napi::Object exports) {
  const Napi::Env env = exports.Env();
  auto function = [&](const char* name, auto body) {
    exports[name] = Napi::Function::New(
        env, [body](const Napi::CallbackInfo& i) { return guarded(i.Env(), [&]() -> Napi::Value { return body(i); }); }, name);
  };
  function("createToken", create_token);
  function("cancel", [](const Napi::CallbackInfo& i) {
    token_of(i[0])->cancel();
    return i.Env().Undefined();
  });
  function("useToken", [](const Napi::CallbackInfo& i) {  // undefined: a fresh one that nobody cancels
    Environment::of(i.Env()).session()->set_token(i[0].IsUndefined() ? std::make_shared<CancelToken>() : token_of(i[0]));
    return i.Env().Undefined();
  });
  function("synchronize", [](const Napi::CallbackInfo& i) {
    std::vector<Tensor> tensors;
    if (!i[0].IsUndefined()) {
      const Napi::Array a = array(i[0], "tensors");
      for (uint32_t k = 0; k < a.Length(); ++k) tensors.push_back(tensor(a.Get(k), "tensor"));
    }
    return Environment::of(i.Env()).submit({"synchronize", std::move(tensors), {}, [](const CancelToken&) {}}, Napi::Object::New(i.Env()));
  });
  function("setThreads", [](const Napi::CallbackInfo& i) {
    const int64_t n = integer(i[0], "threads");
    if (n < 1 || n > 1024) throw Error(ErrorCode::BadInput, "threads", "1 to 1024", std::to_string(n));
    Stream::cpu().set_threads(static_cast<int>(n));
    return i.Env().Undefined();
  });
  function("memoryStats", memory_stats);
  function("resetPeak", [](const Napi::CallbackInfo& i) {
    Allocator::host().reset_peak();
    return i.Env().Undefined();
  });
  function("trimMemory", [](const Napi::CallbackInfo& i) {
    Allocator::host().trim();
    return i.Env().Undefined();
  });
  function("cpuInfo", cpu_info);
  function("measurePeak", measure_peak);
}

}  // namespace uniflow::bindings
