/// One function per op: unwrap, call native/ops (which validates and queues), wrap.
#include "bindings/ops.h"

#include <cstring>

#include "bindings/define.h"
#include "native/core/device.h"
#include "native/ops/attention.h"
#include "native/ops/codes.h"
#include "native/ops/elementwise.h"
#include "native/ops/flow.h"
#include "native/ops/norm.h"
#include "native/ops/patch.h"
#include "native/ops/quality.h"

namespace uniflow::bindings {
namespace {

ops::Normalisation normalisation(Napi::Value v) {
  const Napi::Object o = object(v, "normalisation");
  const std::vector<float> mean = floats(o["mean"], "mean"), std = floats(o["std"], "std");
  if (mean.size() != 3 || std.size() != 3) throw Error(ErrorCode::BadInput, "normalisation", "3 means and 3 deviations", "another count");
  return {{mean[0], mean[1], mean[2]}, {std[0], std[1], std[2]}};
}

LinearLayer layer(Napi::Value v, const char* name) {
  const Napi::Object o = object(v, name);
  return {tensor(o["weight"], name), optional_tensor(o["bias"], name)};
}

FlowHead flow_head(Napi::Value v) {
  const Napi::Object o = object(v, "head");
  FlowHead head{layer(o["time1"], "time1"), layer(o["time2"], "time2"), layer(o["condition"], "condition"),
                layer(o["input"], "input"), {}, layer(o["finalModulation"], "finalModulation"),
                layer(o["output"], "output")};
  const Napi::Array blocks = array(o["blocks"], "blocks");
  for (uint32_t i = 0; i < blocks.Length(); ++i) {
    const Napi::Object b = object(blocks.Get(i), "block");
    head.blocks.push_back({tensor(b["normWeight"], "normWeight"), tensor(b["normBias"], "normBias"),
                           layer(b["fc1"], "fc1"), layer(b["fc2"], "fc2"),
                           layer(b["modulation"], "modulation")});
  }
  return head;
}

ops::FlowOptions flow_options(Napi::Value v) {
  const Napi::Object o = object(v, "options");
  ops::FlowOptions f;
  f.schedule = {floats(o["time"], "time"), floats(o["step"], "step")};
  f.guidance = static_cast<float>(number(o["guidance"], "guidance"));
  f.noise = optional_tensor(o["noise"], "noise");
  f.seed = seed(o["seed"], "seed");
  f.ids = uint32s(o["ids"], "ids");
  f.rows = integer(o["rows"], "rows");
  f.cols = integer(o["cols"], "cols");
  f.patch = integer(o["patch"], "patch");
  f.normalisation = normalisation(o["normalisation"]);
  f.pixel_dtype = dtype(o["output"], "output");
  return f;
}

/// fromHost(array, shape): a tensor with a copy of the array, made before this returns.
Tensor from_host(const ops::SessionRef& session, const Info& info) {
  const Shape dimensions = shape(info[1], "shape");  // read first: this may run the caller's code, which may detach the data
  const HostArray in = host_array(info[0], "data");
  Device& device = session->device();
  const Tensor staged(device, in.dtype, dimensions, device.is_cpu() ? Placement::Pooled : Placement::Staging);
  if (static_cast<size_t>(staged.bytes()) != in.bytes)
    throw Error(ErrorCode::BadInput, "data", std::to_string(staged.size()) + " elements for " + to_string(dimensions),
                std::to_string(in.bytes / static_cast<size_t>(size_of(in.dtype))));
  staged.buffer()->allocate();
  if (in.bytes) std::memcpy(staged.data(), in.data, in.bytes);
  if (device.is_cpu()) return staged;
  const Tensor t(device, in.dtype, dimensions, Placement::Transfer);
  device.stream().enqueue(session, {"fromHost", {}, {t}, [=](const Run& run) { run.backend.upload(t, staged); }});
  return t;
}

RopeUnit rope_unit(Napi::Value v) {
  const std::string s = string(v, "unit");
  if (s == "patch") return RopeUnit::Patch;
  if (s == "image") return RopeUnit::Image;
  throw Error(ErrorCode::BadInput, "unit", "'patch' or 'image'", "'" + s + "'");
}

void define_matrix_ops(Napi::Object exports) {
  define(exports, "packLinear", [](const auto& s, const Info& i) { return ops::pack_linear(s, tensor(i[0], "weight"), dtype(i[1], "dtype")); });
  define(exports, "linear", [](const auto& s, const Info& i) {
    const Napi::Object o = object(i[2], "options");
    return ops::linear(s, tensor(i[0], "x"), tensor(i[1], "weight"),
                       {optional_tensor(o["bias"], "bias"), optional_tensor(o["scale"], "scale"),
                        optional_tensor(o["residual"], "residual"), activation(o["activation"])});
  });
  define(exports, "attention", [](const auto& s, const Info& i) { return ops::attention(s, tensor(i[0], "qkv"), integer(i[1], "heads")); });
  define(exports, "qkNorm", [](const auto& s, const Info& i) {
    return ops::qk_norm(s, tensor(i[0], "qkv"), tensor(i[1], "qWeight"), tensor(i[2], "kWeight"), static_cast<float>(number(i[3], "eps")));
  });
  define(exports, "rope", [](const auto& s, const Info& i) {
    return ops::rope(s, tensor(i[0], "qkv"), integer(i[1], "heads"), integer(i[2], "prefix"), tensor(i[3], "table"));
  });
  define(exports, "ropeTable", [](const auto& s, const Info& i) {
    return ops::rope_table(s, integer(i[0], "rows"), integer(i[1], "cols"), integer(i[2], "headDim"), static_cast<float>(number(i[3], "theta")), rope_unit(i[4]));
  });
  define(exports, "norm", [](const auto& s, const Info& i) {
    const Napi::Object o = object(i[1], "options");
    return ops::norm(s, tensor(i[0], "x"),
                     {optional_tensor(o["weight"], "weight"), optional_tensor(o["bias"], "bias"),
                      optional_tensor(o["scale"], "scale"), optional_tensor(o["shift"], "shift"),
                      static_cast<float>(number(o["eps"], "eps")), boolean(o["rms"], "rms")});
  });
}

void define_pixel_ops(Napi::Object exports) {
  define(exports, "unfold", [](const auto& s, const Info& i) {
    return ops::unfold(s, tensor(i[0], "pixels"), integer(i[1], "patch"), normalisation(i[2]), dtype(i[3], "dtype"));
  });
  define(exports, "fold", [](const auto& s, const Info& i) {
    return ops::fold(s, tensor(i[0], "patches"), integer(i[1], "rows"), integer(i[2], "cols"), integer(i[3], "patch"), normalisation(i[4]),
                     dtype(i[5], "dtype"));
  });
  define(exports, "patchEmbed", [](const auto& s, const Info& i) {
    const Napi::Object o = object(i[1], "options");
    return ops::patch_embed(s, tensor(i[0], "pixels"), tensor(o["weight"], "weight"), optional_tensor(o["bias"], "bias"),
                            optional_tensor(o["prefix"], "prefix"), optional_tensor(o["position"], "position"),
                            integer(o["patch"], "patch"), normalisation(o["normalisation"]),
                            dtype(o["dtype"], "dtype"));
  });
  define(exports, "assemble", [](const auto& s, const Info& i) {
    return ops::assemble(s, tensor(i[0], "x"), optional_tensor(i[1], "prefix"), optional_tensor(i[2], "position"));
  });
  define(exports, "resizeTable", [](const auto& s, const Info& i) {
    return ops::resize_table(s, tensor(i[0], "table"), integer(i[1], "rows"), integer(i[2], "cols"), integer(i[3], "outRows"),
                             integer(i[4], "outCols"), boolean(i[5], "antialias"));
  });
}

void define_codes(Napi::Object exports) {
  define(exports, "fsq", [](const auto& s, const Info& i) { return ops::fsq(s, tensor(i[0], "x"), uint32s(i[1], "levels")); });
  define(exports, "fsqBackward", [](const auto& s, const Info& i) {
    return ops::fsq_backward(s, tensor(i[0], "x"), tensor(i[1], "dOut"), uint32s(i[2], "levels"));
  });
  define(exports, "latentsToCodes", [](const auto& s, const Info& i) {
    return ops::latents_to_codes(s, tensor(i[0], "latents"), uint32s(i[1], "levels"));
  });
  define(exports, "codesToLatents", [](const auto& s, const Info& i) {
    return ops::codes_to_latents(s, tensor(i[0], "codes"), uint32s(i[1], "levels"));
  });
}

SsimConvention ssim_convention(Napi::Value v) {
  const std::string s = string(v, "convention");
  if (s == "standard") return SsimConvention::Standard;
  if (s == "paper") return SsimConvention::Paper;
  throw Error(ErrorCode::BadInput, "convention", "'standard' or 'paper'", "'" + s + "'");
}

}  // namespace

void define_ops(Napi::Object exports) {
  define(exports, "fromHost", from_host);
  define_matrix_ops(exports);
  define_pixel_ops(exports);
  define_codes(exports);
  define(exports, "cast", [](const auto& s, const Info& i) { return ops::cast(s, tensor(i[0], "x"), dtype(i[1], "dtype")); });
  define(exports, "swiglu", [](const auto& s, const Info& i) { return ops::swiglu(s, tensor(i[0], "x")); });
  define(exports, "sliceTokens", [](const auto& s, const Info& i) {
    return ops::slice_tokens(s, tensor(i[0], "x"), integer(i[1], "begin"), integer(i[2], "end"));
  });
  define(exports, "checkFinite", [](const auto& s, const Info& i) { ops::check_finite(s, tensor(i[0], "x"), string(i[1], "name")); });
  define(exports, "imageQuality", [](const auto& s, const Info& i) {
    return ops::image_quality(s, tensor(i[0], "a"), tensor(i[1], "b"), ssim_convention(i[2]));
  });
  define(exports, "noise", [](const auto& s, const Info& i) {
    return ops::noise(s, seed(i[0], "seed"), uint32s(i[1], "ids"), integer(i[2], "patches"), integer(i[3], "width"));
  });
  define(exports, "uniform", [](const auto& s, const Info& i) {
    return ops::uniform(s, seed(i[0], "seed"), uint32s(i[1], "ids"), integer(i[2], "patches"));
  });
  define(exports, "logitNormal", [](const auto& s, const Info& i) {
    return ops::logit_normal(s, seed(i[0], "seed"), uint32s(i[1], "ids"), integer(i[2], "patches"),
                             static_cast<float>(number(i[3], "mean")), static_cast<float>(number(i[4], "std")), static_cast<float>(number(i[5], "zero")));
  });
  define(exports, "flowIntegrate", [](const auto& s, const Info& i) {
    return ops::flow_integrate(s, flow_head(i[0]), tensor(i[1], "condition"), flow_options(i[2]));
  });
  define(exports, "timestepEmbedding", [](const auto& s, const Info& i) { return ops::timestep_embedding(s, tensor(i[0], "t")); });
  define(exports, "flowVelocity", [](const auto& s, const Info& i) {
    return ops::flow_velocity(s, flow_head(i[0]), tensor(i[1], "x"), tensor(i[2], "t"), tensor(i[3], "condition"));
  });
}

}  // namespace uniflow::bindings
