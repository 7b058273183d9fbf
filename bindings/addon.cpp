/// The addon's entry point. Runs once for every environment (and every jest test file) that loads it.
#include "bindings/define.h"
#include "bindings/ops.h"

namespace uniflow::bindings {
namespace {

Napi::Object init(Napi::Env env, Napi::Object exports) {
  auto* environment = new Environment(env);
  env.SetInstanceData<Environment>(environment);
  env.AddCleanupHook([](Environment* e) { e->close(); }, environment);
  define(exports, "setErrorClass", [](const Info& info) {
    if (!info[0].IsFunction()) throw Error(ErrorCode::BadInput, "errorClass", "a class", "something else");
    Environment::of(info.Env()).error_class = Napi::Persistent(info[0].As<Napi::Function>());
  });
  define_tensor_class(env, exports);
  define_ops(exports);
  define_training(exports);
  define_checkpoint(exports);
  define_images(exports);
  define_shard(exports);
  define_device(exports);
  return exports;
}

}  // namespace

NODE_API_MODULE(uniflow, init)

}  // namespace uniflow::bindings
