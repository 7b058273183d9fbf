/// How a native function becomes one of JavaScript.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "bindings/convert.h"
#include "bindings/env.h"

namespace uniflow::bindings {

using Info = Napi::CallbackInfo;

inline Napi::Value returned(Napi::Env, Napi::Value value) { return value; }
inline Napi::Value returned(Napi::Env env, const Tensor& tensor) { return wrap(env, tensor); }

/// For Environment::submit: what must stay alive.
inline Napi::Object keep(Napi::Env env, std::initializer_list<napi_value> values) {
  auto all = Napi::Array::New(env);
  for (const napi_value value : values) all[all.Length()] = value;
  return all;
}

/// exports[name] calls `body(info)`, or `body(session, info)` of an op. It returns a JavaScript value, a tensor, or nothing; its errors are thrown
/// as UniFlowErrors.
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
