#include "bindings/env.h"

namespace uniflow::bindings {

Environment::Environment(Napi::Env env) : env_(env) {
  auto on_wake = [](napi_env js, napi_value, void* context, void*) {
    if (js) static_cast<Environment*>(context)->settle_completed();
  };
  const napi_status status = napi_create_threadsafe_function(env, nullptr, nullptr, Napi::String::New(env, "uniflow"), 0, 1, nullptr,
                                                             nullptr, this, on_wake, &wake_);
  if (status != napi_ok) throw Napi::Error::New(env, "uniflow-tokenizer: cannot create a thread-safe function");
  napi_unref_threadsafe_function(env, wake_);
}

Environment::~Environment() = default;

void Environment::close() {
  session_->close();
  std::lock_guard lock(mutex_);
  closed_ = true;
  completed_.clear();
  napi_release_threadsafe_function(wake_, napi_tsfn_abort);
}

Napi::Promise Environment::submit(WorkQueue& queue, Command command, Napi::Object keep, Result result) {
  auto* pending = new Pending{Napi::Promise::Deferred::New(env_), Napi::Persistent(keep), std::move(result), nullptr};
  const Napi::Promise promise = pending->deferred.Promise();
  if (pending_++ == 0) napi_ref_threadsafe_function(env_, wake_);
  command.done = [this, pending](std::shared_ptr<const Error> failure) {
    // Runs on one of the device's threads. close() waits for this call to return, so `this` is alive.
    pending->failure = std::move(failure);
    std::lock_guard lock(mutex_);
    completed_.emplace_back(pending);
    napi_call_threadsafe_function(wake_, nullptr, napi_tsfn_nonblocking);
  };
  try {
    queue.enqueue(session_, std::move(command));
  } catch (...) {  // the command was not queued
    if (--pending_ == 0) napi_unref_threadsafe_function(env_, wake_);
    delete pending;
    throw;
  }
  return promise;
}

void Environment::settle_completed() {
  Napi::HandleScope scope(env_);
  std::vector<std::unique_ptr<Pending>> batch;
  {
    std::lock_guard lock(mutex_);
    if (closed_) return;
    batch.swap(completed_);
  }
  pending_ -= static_cast<int64_t>(batch.size());
  if (!batch.empty() && pending_ == 0) napi_unref_threadsafe_function(env_, wake_);
  for (auto& p : batch) {
    // Nothing thrown here may reach Node's event loop. Either the error class threw, or the environment is terminating and nobody waits any
    // more.
    try {
      try {
        if (p->failure) throw to_js(env_, *p->failure);
        p->deferred.Resolve(p->result ? guarded(env_, [&] { return p->result(env_, p->keep.Value()); }) : env_.Undefined());
      } catch (const Napi::Error& e) {
        p->deferred.Reject(e.Value());
      }
    } catch (const Napi::Error&) {
    }
  }
}

Napi::Error to_js(Napi::Env env, const Error& e) {
  Environment& environment = Environment::of(env);
  const auto text = [&](const std::string& s) -> Napi::Value { return s.empty() ? env.Undefined() : Napi::String::New(env, s); };
  auto details = Napi::Object::New(env);
  details["subject"] = text(e.subject);
  details["expected"] = text(e.expected);
  details["actual"] = text(e.actual);
  details["op"] = text(e.op);
  if (environment.error_class.IsEmpty()) return Napi::Error::New(env, e.what());
  try {
    const Napi::Value error = environment.error_class.New({Napi::String::New(env, name_of(e.code)), Napi::String::New(env, e.what()), details});
    if (error.IsObject()) return Napi::Error(env, error);
  } catch (const Napi::Error&) {
    // the class could not be instantiated: the plain error below still carries the message
  }
  return Napi::Error::New(env, e.what());
}

}  // namespace uniflow::bindings
