/// A flow head in the GPU's memory, as its kernels take it.
#pragma once

#include <functional>

#include "native/ops/flow.h"
#include "native/test/gpu/gpu.h"

namespace uniflow::test {

/// `n` float32 values of the parameter with this name in a checkpoint.
using Parameters = std::function<Array(const std::string& name, int64_t n)>;

/// [out, in], stored as products in `dtype` read it.
inline Tensor make_weight(const Array& values, int64_t out, int64_t in, DType dtype) {
  const DeviceArray plain(values);
  auto packing = gpu().linear_packing(out, in, dtype);
  Tensor packed(gpu_device(), dtype, {out, in}, packing, gpu().packed_bytes(*packing));
  packed.buffer()->allocate();
  gpu().pack(*packing, plain.data(), plain.dtype(), packed.data());
  return packed;
}

inline LinearLayer make_layer(const Parameters& parameters, const std::string& name, int64_t out, int64_t in, DType dtype) {
  return {make_weight(parameters(name + ".weight", out * in), out, in, dtype), to_gpu(parameters(name + ".bias", out), {out})};
}

inline FlowHead make_flow_head(const Parameters& parameters, int64_t width, int64_t pixels, int64_t blocks, DType dtype) {
  const std::string net = "flow_head.net.";
  auto layer = [&](const std::string& name, int64_t out, int64_t in) { return make_layer(parameters, net + name, out, in, dtype); };
  FlowHead head{layer("time_embed.mlp.0", width, 256), layer("time_embed.mlp.2", width, width), layer("cond_embed", width, width),
                layer("input_proj", width, pixels), {}, layer("final_layer.adaLN_modulation.1", 2 * width, width),
                layer("final_layer.linear", pixels, width)};
  for (int64_t i = 0; i < blocks; ++i) {
    const std::string block = "res_blocks." + std::to_string(i);
    auto vector = [&](const char* name) { return to_gpu(parameters(net + block + name, width), {width}); };
    head.blocks.push_back({vector(".in_ln.weight"), vector(".in_ln.bias"), layer(block + ".mlp.0", width, width),
                           layer(block + ".mlp.2", width, width), layer(block + ".adaLN_modulation.1", 3 * width, width)});
  }
  return head;
}

}  // namespace uniflow::test
