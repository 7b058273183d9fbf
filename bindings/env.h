/// State of one JavaScript environment (the main thread, or a worker_thread): its session on the stream, its error class, its pending
/// promises. Created by addon.cpp when the environment loads the addon.
#pragma once

#include <napi.h>

#include <functional>
#include <mutex>
#include <new>
#include <vector>

#include "native/core/work_queue.h"

namespace uniflow::bindings {

class Environment {
 public:
  explicit Environment(Napi::Env env);
  ~Environment();

  static Environment& of(Napi::Env env) { return *env.GetInstanceData<Environment>(); }

  const std::shared_ptr<Session>& session() const { return session_; }
  Napi::FunctionReference error_class;   // UniFlowError, set by lib/native.ts
  Napi::FunctionReference tensor_class;

  using Result = std::function<Napi::Value(Napi::Env, Napi::Object kept)>;

  /// Queues `command` and returns a promise. It resolves when the command has ended, with `result(env, keep)` or, without a result
  /// function, with undefined; it rejects with the command's failure. `keep` stays alive until then.
  Napi::Promise submit(WorkQueue& queue, Command command, Napi::Object keep, Result result = nullptr);

  /// Cancels this environment's work and waits for it. Called when the environment is torn down.
  void close();

 private:
  struct Pending {
    Napi::Promise::Deferred deferred;
    Napi::ObjectReference keep;
    Result result;
    std::shared_ptr<const Error> failure;
  };

  void settle_completed();

  Napi::Env env_;
  std::shared_ptr<Session> session_ = std::make_shared<Session>();
  napi_threadsafe_function wake_ = nullptr;
  int64_t pending_ = 0;  // keeps the event loop alive while above 0
  std::mutex mutex_;
  std::vector<std::unique_ptr<Pending>> completed_;  // guarded by mutex_
  bool closed_ = false;                              // guarded by mutex_
};

/// Converts the failure to the JavaScript error that the library throws.
Napi::Error to_js(Napi::Env env, const Error& error);

/// Runs a binding's body and rethrows a native Error as a UniFlowError.
template <class Body>
auto guarded(Napi::Env env, Body&& body) {
  try {
    return body();
  } catch (const Error& e) {
    throw to_js(env, e);
  } catch (const Napi::Error&) {  // thrown by JavaScript
    throw;
  } catch (const std::bad_alloc&) {
    throw to_js(env, Error(ErrorCode::OutOfMemory, "out of host memory"));
  } catch (const std::exception& e) {
    throw to_js(env, Error(ErrorCode::Internal, e.what()));
  }
}

}  // namespace uniflow::bindings
