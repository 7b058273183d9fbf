/// Linear layers on the CPU through oneDNN, with weights packed once into the layout that its kernels read.
///
/// out = residual + scale * act(x W^T + bias). FLOPs 2*M*N*K; floor: FLOPs over the FMA peak.
#pragma once

#include <memory>

#include "native/core/tensor.h"
#include "native/ops/kernels.h"

namespace uniflow::cpu {

/// Blocking of a weight [out, in] for products in `dtype`. Without bfloat16 arithmetic in the machine,
/// a bfloat16 layer is stored and computed in float32.
std::shared_ptr<const Packing> linear_packing(int64_t out, int64_t in, DType dtype);
int64_t packed_bytes(const Packing& packing);

/// The "blocking" of a weight that stays as it is, [out, in] in C order: what training uses, where weights change every step and
/// repacking them would cost more than it saves.
std::shared_ptr<const Packing> plain_packing(int64_t out, int64_t in, DType dtype);

/// plain [out, in] of `dtype` -> packed, and back.
void pack(const Packing& packing, const void* plain, DType dtype, void* packed);
void unpack(const Packing& packing, const void* packed, void* plain, DType dtype);

void linear(const LinearArgs& args);

void linear_backward(const LinearBackwardArgs& args);

/// "oneDNN 2.6.3, brg:avx512_core_bf16" and whether bfloat16 products are native here.
std::string linear_backend();
bool native_bfloat16();

}  // namespace uniflow::cpu
