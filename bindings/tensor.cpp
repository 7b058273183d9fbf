/// The JavaScript handle of a tensor: shape and dtype at once, `read` once its value is computed, `dispose`.
#include <atomic>
#include <cstring>

#include "bindings/convert.h"
#include "bindings/env.h"
#include "native/core/device.h"

namespace uniflow::bindings {
namespace {

// The addon may be loaded several times in one process (jest loads it once per test file). The tag identifies our objects, whichever copy
// of the addon created their class.
constexpr napi_type_tag kTensorTag = {0x9b1f6f0a5d7e4c21, 0x8f3a7c45e2d06b19};
constexpr napi_type_tag kConstructorTag = {0x3d5f8e12b7a94c06, 0xc4e1a09d7f2b6835};  // tags the argument that wrap() passes to the constructor
std::atomic<int64_t> handles{0};

class TensorHandle : public Napi::ObjectWrap<TensorHandle> {
 public:
  explicit TensorHandle(const Napi::CallbackInfo& info) : Napi::ObjectWrap<TensorHandle>(info) {
    if (info.Length() != 1 || !info[0].IsExternal() || !info[0].As<Napi::External<Tensor>>().CheckTypeTag(&kConstructorTag))
      throw to_js(info.Env(), Error(ErrorCode::BadInput, "TensorHandle", "to be made by an operation", "new"));
    tensor = *info[0].As<Napi::External<Tensor>>().Data();
    info.This().As<Napi::Object>().TypeTag(&kTensorTag);
    // Only weights are reported to V8. Activations of gigabytes come and go within a call; reporting them would trigger collections of tens
    // of milliseconds for memory that tidy() has already freed.
    if (tensor.buffer()->placement == Placement::Persistent && tensor.device().is_cpu()) {
      accounted_ = tensor.buffer()->bytes;
      Napi::MemoryManagement::AdjustExternalMemory(info.Env(), accounted_);
    }
    ++handles;
  }
  ~TensorHandle() override {
    if (tensor) --handles;
  }
  void Finalize(Napi::Env env) override { release(env); }

  static Napi::Function define(Napi::Env env) {
    return DefineClass(env, "TensorHandle",
                       {InstanceAccessor<&TensorHandle::get_shape>("shape"), InstanceAccessor<&TensorHandle::get_dtype>("dtype"),
                        InstanceAccessor<&TensorHandle::get_device>("device"),
                        InstanceAccessor<&TensorHandle::get_packed>("packed"), InstanceAccessor<&TensorHandle::get_disposed>("disposed"),
                        InstanceAccessor<&TensorHandle::get_bytes>("bytes"), InstanceMethod<&TensorHandle::dispose>("dispose"),
                        InstanceMethod<&TensorHandle::reshape>("reshape"), InstanceMethod<&TensorHandle::slice>("slice"), InstanceMethod<&TensorHandle::share>("share"), InstanceMethod<&TensorHandle::read>("read")});
  }

  Tensor tensor;  // empty once disposed

 private:
  void release(Napi::Env env) {
    if (!tensor) return;
    tensor = {};
    --handles;
    if (accounted_) Napi::MemoryManagement::AdjustExternalMemory(env, -accounted_);
  }

  const Tensor& live() const {
    if (!tensor) throw Error(ErrorCode::Disposed, "the tensor was used after dispose()");
    return tensor;
  }

  Napi::Value get_shape(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&]() -> Napi::Value {
      const Shape& s = live().shape();
      auto out = Napi::Array::New(info.Env(), s.size());
      for (uint32_t i = 0; i < s.size(); ++i) out[i] = Napi::Number::New(info.Env(), static_cast<double>(s[i]));
      return out;
    });
  }
  Napi::Value get_dtype(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] { return Napi::String::New(info.Env(), name_of(live().dtype())); });
  }
  Napi::Value get_device(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] { return Napi::String::New(info.Env(), live().device().name()); });
  }
  Napi::Value get_packed(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] { return Napi::Boolean::New(info.Env(), live().packing() != nullptr); });
  }
  Napi::Value get_bytes(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] { return Napi::Number::New(info.Env(), static_cast<double>(live().buffer()->bytes)); });
  }
  Napi::Value get_disposed(const Napi::CallbackInfo& info) { return Napi::Boolean::New(info.Env(), !tensor); }
  void dispose(const Napi::CallbackInfo& info) { release(info.Env()); }

  Napi::Value reshape(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] {
      Shape s = shape(info[0], "shape");
      if (live().packing() || count(s) != live().size())
        throw Error(ErrorCode::BadInput, "shape", std::to_string(live().size()) + " elements", to_string(s));
      return wrap(info.Env(), live().reshape(std::move(s)));
    });
  }

  /// slice(begin, end): rows of the first dimension, sharing the memory.
  Napi::Value slice(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] {
      const int64_t begin = integer(info[0], "begin"), end = integer(info[1], "end");
      if (live().packing() || live().rank() < 1 || begin < 0 || end < begin || end > live().dim(0))
        throw Error(ErrorCode::BadInput, "slice", "a range within the first dimension of " + to_string(live().shape()),
                    "[" + std::to_string(begin) + ", " + std::to_string(end) + ")");
      return wrap(info.Env(), live().slice(begin, end));
    });
  }

  Napi::Value share(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] { return wrap(info.Env(), live()); });
  }

  /// read(into): fills a typed array with the values (bfloat16 and packed ones as float32).
  Napi::Value read(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&]() -> Napi::Value {
      const Tensor t = live();
      const HostArray into = host_array(info[0], "into");
      const DType want = t.packing() || t.dtype() == DType::BFloat16 ? DType::Float32 : t.dtype();
      if (into.dtype != want || into.bytes != static_cast<size_t>(t.size() * size_of(want)))
        throw Error(ErrorCode::BadInput, "into", std::to_string(t.size()) + " elements of " + name_of(want),
                    std::to_string(into.bytes) + " bytes of " + name_of(into.dtype));
      auto copy = [t, into, want](const Run& run) { run.backend.download(into.data, want, t); };
      return Environment::of(info.Env()).submit(t.device().stream(), {"read", {t}, {}, copy}, info[0].As<Napi::Object>());
    });
  }

  int64_t accounted_ = 0;
};

TensorHandle* unwrap(Napi::Value v) {
  if (!v.IsObject() || !v.As<Napi::Object>().CheckTypeTag(&kTensorTag)) return nullptr;
  return TensorHandle::Unwrap(v.As<Napi::Object>());
}

}  // namespace

Tensor tensor(Napi::Value v, const char* name) {
  const TensorHandle* handle = unwrap(v);
  if (!handle) throw Error(ErrorCode::BadInput, name, "a tensor", v.IsUndefined() ? "undefined" : "something else");
  if (!handle->tensor) throw Error(ErrorCode::Disposed, std::string(name) + ": the tensor was used after dispose()");
  return handle->tensor;
}

Tensor optional_tensor(Napi::Value v, const char* name) {
  return v.IsUndefined() || v.IsNull() ? Tensor() : tensor(v, name);
}

Napi::Value wrap(Napi::Env env, const Tensor& t) {
  auto content = Napi::External<Tensor>::New(env, const_cast<Tensor*>(&t));
  content.TypeTag(&kConstructorTag);
  return Environment::of(env).tensor_class.New({content});
}

void define_tensor_class(Napi::Env env, Napi::Object exports) {
  const Napi::Function constructor = TensorHandle::define(env);
  Environment::of(env).tensor_class = Napi::Persistent(constructor);
  exports["TensorHandle"] = constructor;
}

int64_t live_handles() { return handles.load(); }

}  // namespace uniflow::bindings
