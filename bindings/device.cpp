/// Threads, memory, cancellation, and the machine's abilities.
#include "bindings/define.h"
#include "bindings/ops.h"
#include "native/core/device.h"
#include "native/core/team.h"
#include "native/cpu/kernels.h"

namespace uniflow::bindings {
namespace {

constexpr napi_type_tag kTokenTag = {0x5e0b8d1f9a2c4763, 0xb1d4e6f8a0927c35};
using TokenRef = std::shared_ptr<CancelToken>;

TokenRef token_of(Napi::Value v) {
  if (!v.IsExternal() || !v.As<Napi::External<TokenRef>>().CheckTypeTag(&kTokenTag))
    throw Error(ErrorCode::BadInput, "token", "a cancellation token", "something else");
  return *v.As<Napi::External<TokenRef>>().Data();
}

Napi::Value create_token(const Info& info) {
  auto handle = Napi::External<TokenRef>::New(info.Env(), new TokenRef(std::make_shared<CancelToken>()), [](Napi::Env, TokenRef* t) { delete t; });
  handle.TypeTag(&kTokenTag);
  return handle;
}

Napi::Object stats_of(Napi::Env env, const MemoryStats& s) {
  auto out = Napi::Object::New(env);
  for (const auto& [name, v] : {std::pair{"active", s.active}, std::pair{"peak", s.peak}, std::pair{"pool", s.pool}})
    out[name] = Napi::Number::New(env, static_cast<double>(v));
  return out;
}

/// { handles, devices: { cpu: { active, peak, pool }, 'cuda:0': ... } }, for the devices used so far.
Napi::Value memory_stats(const Info& info) {
  auto out = Napi::Object::New(info.Env()), devices = Napi::Object::New(info.Env());
  for (Device* d : Device::opened()) devices[d->name()] = stats_of(info.Env(), d->memory().stats());
  out["devices"] = devices;
  out["handles"] = Napi::Number::New(info.Env(), static_cast<double>(live_handles()));
  return out;
}

/// All devices: { name, available, description }.
Napi::Value list_devices(const Info& info) {
  const std::vector<Device::Status> all = Device::all();
  auto out = Napi::Array::New(info.Env(), all.size());
  for (uint32_t i = 0; i < all.size(); ++i) {
    auto o = Napi::Object::New(info.Env());
    o["name"] = Napi::String::New(info.Env(), all[i].name);
    o["available"] = Napi::Boolean::New(info.Env(), all[i].available);
    o["description"] = Napi::String::New(info.Env(), all[i].description);
    out[i] = o;
  }
  return out;
}

/// openDevice(name): returns the full name ('cuda' gives 'cuda:0').
Napi::Value open_device(const Info& info) {
  return Napi::String::New(info.Env(), Device::get(string(info[0], "device")).name());
}

/// useDevice(name): tensors that are not made from other tensors are created there from now on.
Napi::Value use_device(const Info& info) {
  Environment::of(info.Env()).session()->set_device(&Device::get(string(info[0], "device")));
  return info.Env().Undefined();
}

Napi::Value cpu_info(const Info& info) {
  auto out = Napi::Object::New(info.Env());
  out["kernels"] = Napi::String::New(info.Env(), cpu::kernels().name);
  const auto sets = cpu::instruction_sets();
  auto names = Napi::Array::New(info.Env(), sets.size());
  for (uint32_t i = 0; i < sets.size(); ++i) names[i] = Napi::String::New(info.Env(), sets[i]);
  out["instructionSets"] = names;
  out["nativeBfloat16"] = Napi::Boolean::New(info.Env(), cpu::kernels().native_bfloat16);
  out["threads"] = Napi::Number::New(info.Env(), Device::cpu().stream().threads());
  out["defaultThreads"] = Napi::Number::New(info.Env(), default_threads());
  return out;
}

/// measurePeak(into): fills a Float64Array with [bfloat16 FLOP/s, float32 FLOP/s, copied bytes/s, int8 operations/s (0 on a GPU)] of the current device, measured on its
/// stream.
Napi::Value measure_peak(const Info& info) {
  if (!info[0].IsTypedArray() || info[0].As<Napi::TypedArray>().TypedArrayType() != napi_float64_array ||
      info[0].As<Napi::TypedArray>().ElementLength() != 4)
    throw Error(ErrorCode::BadInput, "into", "a Float64Array of 4", "something else");
  double* into = info[0].As<Napi::Float64Array>().Data();
  Environment& environment = Environment::of(info.Env());
  Device& device = environment.session()->device();
  const int64_t bytes = 256 << 20;  // far larger than any cache
  Tensor from(device, DType::UInt8, {bytes}), to(device, DType::UInt8, {bytes});
  auto run = [=](const Run& run) {
    into[0] = run.kernels.peak(DType::BFloat16);
    into[1] = run.kernels.peak(DType::Float32);
    for (const Tensor& t : {from, to}) run.kernels.copy_rows(t.data(), bytes / 1024, nullptr, 0, bytes / 1024, 1024);  // touch the pages once
    into[2] = run.kernels.copy_rate(to.data(), from.data(), bytes);
    into[3] = from.device().is_cpu() ? run.kernels.peak(DType::Int8) : 0;
  };
  return environment.submit(device.stream(), {"measurePeak", {}, {from, to}, run}, info[0].As<Napi::Object>());
}

}  // namespace

void define_device(Napi::Object exports) {
  define(exports, "createToken", create_token);
  define(exports, "cancel", [](const Info& i) {
    token_of(i[0])->cancel();
  });
  define(exports, "useToken", [](const Info& i) {  // undefined: a new token that is never cancelled
    Environment::of(i.Env()).session()->set_token(i[0].IsUndefined() ? std::make_shared<CancelToken>() : token_of(i[0]));
  });
  define(exports, "synchronize", [](const Info& i) {
    std::vector<Tensor> tensors;
    if (!i[0].IsUndefined()) {
      const Napi::Array a = array(i[0], "tensors");
      for (uint32_t k = 0; k < a.Length(); ++k) tensors.push_back(tensor(a.Get(k), "tensor"));
    }
    Environment& environment = Environment::of(i.Env());
    Device& device = tensors.empty() ? environment.session()->device() : tensors[0].device();
    return environment.submit(device.stream(), {"synchronize", std::move(tensors), {}, [](const Run&) {}}, Napi::Object::New(i.Env()));
  });
  define(exports, "setThreads", [](const Info& i) {
    const int64_t n = integer(i[0], "threads");
    if (n < 1 || n > kMostThreads) throw Error(ErrorCode::BadInput, "threads", "1 to " + std::to_string(kMostThreads), std::to_string(n));
    Device::cpu().stream().set_threads(static_cast<int>(n));
  });
  define(exports, "memoryStats", memory_stats);
  define(exports, "resetPeak", [](const Info&) {
    for (Device* d : Device::opened()) d->memory().reset_peak();
  });
  define(exports, "trimMemory", [](const Info&) {
    for (Device* d : Device::opened()) {
      d->memory().trim();
      d->staging().trim();
    }
  });
  define(exports, "devices", list_devices);
  define(exports, "openDevice", open_device);
  define(exports, "useDevice", use_device);
  define(exports, "cpuInfo", cpu_info);
  define(exports, "measurePeak", measure_peak);
}

}  // namespace uniflow::bindings
