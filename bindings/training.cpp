/// Operations used only by training and evaluation: backward passes, losses, the optimizer, statistics.
#include "bindings/define.h"
#include "bindings/ops.h"
#include "native/ops/attention.h"
#include "native/ops/elementwise.h"
#include "native/ops/losses.h"
#include "native/ops/norm.h"
#include "native/ops/optimizer.h"
#include "native/ops/patch.h"
#include "native/ops/residual.h"
#include "native/ops/statistics.h"

namespace uniflow::bindings {
namespace {

/// { name: tensor } for the tensors that are not empty.
Napi::Object wrap_all(Napi::Env env, std::initializer_list<std::pair<const char*, Tensor>> tensors) {
  auto out = Napi::Object::New(env);
  for (const auto& [name, tensor] : tensors)
    if (tensor) out[name] = wrap(env, tensor);
  return out;
}

Napi::Array wrap_list(Napi::Env env, const std::vector<Tensor>& tensors) {
  auto out = Napi::Array::New(env, tensors.size());
  for (uint32_t i = 0; i < tensors.size(); ++i) out[i] = wrap(env, tensors[i]);
  return out;
}

std::vector<Tensor> tensors(Napi::Value v, const char* name) {
  const Napi::Array a = array(v, name);
  std::vector<Tensor> out;
  for (uint32_t i = 0; i < a.Length(); ++i) out.push_back(optional_tensor(a.Get(i), name));
  return out;
}

float real(Napi::Value v, const char* name) { return static_cast<float>(number(v, name)); }

ops::NormOptions norm_options(const Napi::Object& o) {
  return {optional_tensor(o.Get("weight"), "weight"), optional_tensor(o.Get("bias"), "bias"), optional_tensor(o.Get("scale"), "scale"),
          optional_tensor(o.Get("shift"), "shift"), real(o.Get("eps"), "eps"), boolean(o.Get("rms"), "rms")};
}

LayerWeights layer_weights(Napi::Value v) {
  const std::string s = string(v, "weights");
  if (s == "adaptive") return LayerWeights::Adaptive;
  if (s == "uniform") return LayerWeights::Uniform;
  if (s == "last") return LayerWeights::Last;
  throw Error(ErrorCode::BadInput, "weights", "'adaptive', 'uniform' or 'last'", "'" + s + "'");
}

void define_backward(Napi::Object exports) {
  define(exports, "linearBackward", [](const auto& s, const Info& i) {
    const auto g = ops::linear_backward(s, tensor(i[0], "x"), tensor(i[1], "weight"), tensor(i[2], "dOut"), boolean(i[3], "wantX"),
                                        boolean(i[4], "wantWeight"), boolean(i[5], "wantBias"));
    return wrap_all(i.Env(), {{"x", g.x}, {"weight", g.weight}, {"bias", g.bias}});
  });
  define(exports, "attentionForward", [](const auto& s, const Info& i) {
    const auto f = ops::attention_forward(s, tensor(i[0], "qkv"), integer(i[1], "heads"));
    return wrap_all(i.Env(), {{"out", f.out}, {"logSumExp", f.log_sum_exp}});
  });
  define(exports, "attentionBackward", [](const auto& s, const Info& i) {
    return ops::attention_backward(s, tensor(i[0], "qkv"), tensor(i[1], "out"), tensor(i[2], "dOut"),
                                                 tensor(i[3], "logSumExp"), integer(i[4], "heads"));
  });
  define(exports, "normBackward", [](const auto& s, const Info& i) {
    const auto g = ops::norm_backward(s, tensor(i[0], "x"), tensor(i[1], "dOut"), norm_options(object(i[2], "options")));
    return wrap_all(i.Env(), {{"x", g.x}, {"weight", g.weight}, {"bias", g.bias}, {"scale", g.scale}, {"shift", g.shift}});
  });
  define(exports, "qkNormBackward", [](const auto& s, const Info& i) {
    const auto g = ops::qk_norm_backward(s, tensor(i[0], "qkv"), tensor(i[1], "dOut"), tensor(i[2], "qWeight"), tensor(i[3], "kWeight"),
                                         real(i[4], "eps"));
    return wrap_all(i.Env(), {{"qkv", g.qkv}, {"qWeight", g.q_weight}, {"kWeight", g.k_weight}});
  });
  define(exports, "ropeBackward", [](const auto& s, const Info& i) {
    return ops::rope(s, tensor(i[0], "dOut"), integer(i[1], "heads"), integer(i[2], "prefix"), tensor(i[3], "table"), true);
  });
  define(exports, "activation", [](const auto& s, const Info& i) {
    return ops::activation(s, tensor(i[0], "x"), activation(i[1]));
  });
  define(exports, "activationBackward", [](const auto& s, const Info& i) {
    return ops::activation_backward(s, tensor(i[0], "x"), tensor(i[1], "dOut"), activation(i[2]));
  });
  define(exports, "scaleAdd", [](const auto& s, const Info& i) {
    return ops::scale_add(s, tensor(i[0], "residual"), tensor(i[1], "branch"), optional_tensor(i[2], "scale"),
                                        optional_tensor(i[3], "gate"));
  });
  define(exports, "scaleAddBackward", [](const auto& s, const Info& i) {
    const auto g = ops::scale_add_backward(s, tensor(i[0], "dOut"), tensor(i[1], "branch"), optional_tensor(i[2], "scale"),
                                           optional_tensor(i[3], "gate"));
    return wrap_all(i.Env(), {{"branch", g.branch}, {"scale", g.scale}, {"gate", g.gate}});
  });
  define(exports, "swigluBackward", [](const auto& s, const Info& i) {
    return ops::swiglu_backward(s, tensor(i[0], "x"), tensor(i[1], "dOut"));
  });
  define(exports, "resizeTableBackward", [](const auto& s, const Info& i) {
    return ops::resize_table_backward(s, tensor(i[0], "dOut"), integer(i[1], "rows"), integer(i[2], "cols"),
                                                    integer(i[3], "outRows"), integer(i[4], "outCols"), boolean(i[5], "antialias"));
  });
}

void define_shaping(Napi::Object exports) {
  define(exports, "add", [](const auto& s, const Info& i) {
    return ops::add(s, optional_tensor(i[0], "a"), tensor(i[1], "b"), optional_tensor(i[2], "factor"), integer(i[3], "index"),
                                  real(i[4], "scale"));
  });
  define(exports, "sumRows", [](const auto& s, const Info& i) {
    return ops::sum_rows(s, tensor(i[0], "x"), static_cast<int>(integer(i[1], "kept")));
  });
  define(exports, "padTokens", [](const auto& s, const Info& i) {
    return ops::pad_tokens(s, tensor(i[0], "x"), integer(i[1], "begin"), integer(i[2], "total"));
  });
  define(exports, "split", [](const auto& s, const Info& i) {
    return ops::split(s, tensor(i[0], "x"), integer(i[1], "part"), integer(i[2], "parts"));
  });
  define(exports, "concat", [](const auto& s, const Info& i) { return ops::concat(s, tensors(i[0], "parts")); });
}

void define_losses(Napi::Object exports) {
  define(exports, "distillation", [](const auto& s, const Info& i) {
    const auto d = ops::distillation(s, tensors(i[0], "student"), tensors(i[1], "teacher"), real(i[2], "beta"), integer(i[3], "skip"),
                                     layer_weights(i[4]), boolean(i[5], "grads"));
    auto out = wrap_all(i.Env(), {{"loss", d.loss}, {"alpha", d.alpha}, {"weight", d.weight}});
    out["grads"] = wrap_list(i.Env(), d.grads);
    return out;
  });
  define(exports, "interpolate", [](const auto& s, const Info& i) {
    const auto pair = ops::interpolate(s, tensor(i[0], "data"), tensor(i[1], "noise"), tensor(i[2], "t"));
    return wrap_all(i.Env(), {{"noisy", pair.noisy}, {"target", pair.target}});
  });
  define(exports, "meanSquaredError", [](const auto& s, const Info& i) {
    const auto loss = ops::mean_squared_error(s, tensor(i[0], "value"), tensor(i[1], "target"));
    return wrap_all(i.Env(), {{"loss", loss.loss}, {"grad", loss.grad}});
  });
  define(exports, "crossEntropy", [](const auto& s, const Info& i) {
    const auto loss = ops::cross_entropy(s, tensor(i[0], "logits"), tensor(i[1], "labels"));
    return wrap_all(i.Env(), {{"loss", loss.loss}, {"grad", loss.grad}, {"correct", loss.correct}});
  });
}

std::vector<ops::OptimizedParameter> optimized(Napi::Value v) {
  const Napi::Array a = array(v, "parameters");
  std::vector<ops::OptimizedParameter> out;
  for (uint32_t k = 0; k < a.Length(); ++k) {
    const Napi::Object o = object(a.Get(k), "parameter");
    out.push_back({tensor(o.Get("parameter"), "parameter"), tensor(o.Get("grad"), "grad"), tensor(o.Get("m"), "m"), tensor(o.Get("v"), "v"),
                   optional_tensor(o.Get("average"), "average"), optional_tensor(o.Get("compute"), "compute"), real(o.Get("lr"), "lr"),
                   real(o.Get("weightDecay"), "weightDecay")});
  }
  return out;
}

void define_optimizer(Napi::Object exports) {
  define(exports, "globalNorm", [](const auto& s, const Info& i) { return ops::global_norm(s, tensors(i[0], "grads")); });
  define(exports, "adamw", [](const auto& s, const Info& i) {
    const Napi::Object o = object(i[2], "options");
    ops::adamw(s, optimized(i[0]), tensor(i[1], "norm"),
               {real(o.Get("beta1"), "beta1"), real(o.Get("beta2"), "beta2"), real(o.Get("eps"), "eps"), real(o.Get("ema"), "ema"),
                real(o.Get("clip"), "clip"), integer(o.Get("step"), "step")});
  });
}

void define_statistics(Napi::Object exports) {
  define(exports, "topK", [](const auto& s, const Info& i) {
    const auto top = ops::top_k(s, tensor(i[0], "scores"), integer(i[1], "k"));
    return wrap_all(i.Env(), {{"values", top.values}, {"indices", top.indices}});
  });
  define(exports, "covariance", [](const auto& s, const Info& i) {
    const auto c = ops::covariance(s, tensor(i[0], "x"));
    return wrap_all(i.Env(), {{"mean", c.mean}, {"covariance", c.covariance}});
  });
}

}  // namespace

void define_training(Napi::Object exports) {
  define_backward(exports);
  define_shaping(exports);
  define_losses(exports);
  define_optimizer(exports);
  define_statistics(exports);
}

}  // namespace uniflow::bindings
