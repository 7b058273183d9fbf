/// Exports native functions to JavaScript.
#pragma once

#include <functional>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "bindings/convert.h"
#include "bindings/env.h"
#include "native/core/host_pool.h"

namespace uniflow::bindings {

using Info = Napi::CallbackInfo;

inline Napi::Value returned(Napi::Env, Napi::Value value) { return value; }
inline Napi::Value returned(Napi::Env env, const Tensor& tensor) { return wrap(env, tensor); }

/// Values that Environment::submit must keep alive.
inline Napi::Object keep(Napi::Env env, std::initializer_list<napi_value> values) {
  auto all = Napi::Array::New(env);
  for (const napi_value value : values) all[all.Length()] = value;
  return all;
}

/// Lets the CPU work on the caller's memory (kept alive by `kept`) in parallel with the model: see Command::computes.
inline Napi::Value submit_beside(const Info& info, const char* op, std::function<void(const Run&)> run, std::initializer_list<napi_value> kept,
                                 Environment::Result result = nullptr) {
  const Napi::Env env = info.Env();
  Command command{.op = op, .inputs = {}, .outputs = {}, .run = std::move(run), .computes = true};
  return Environment::of(env).submit(HostPool::instance(), std::move(command), keep(env, kept), std::move(result));
}

/// exports[name] calls `body(info)`, or `body(session, info)` for an op. The body returns a JavaScript value, a tensor, or nothing; its
/// errors are thrown as UniFlowErrors.
template <class Body>
void define(Napi::Object exports, const char* name, Body body) {
  const auto call = [body](const Info& info) {
    if constexpr (std::is_invocable_v<Body, const Info&>) return body(info);
    else return body(Environment::of(info.Env()).session(), info);
  };
  const auto function = [call](const Info& info) {
    return guarded(info.Env(), [&]() -> Napi::Value {
      if constexpr (std::is_void_v<decltype(call(info))>) return call(info), info.Env().Undefined();
      else return returned(info.Env(), call(info));
    });
  };
  exports[name] = Napi::Function::New(exports.Env(), function, name);
}

}  // namespace uniflow::bindings
