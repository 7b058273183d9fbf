/// Linear layers on the CPU through oneDNN, with weights packed once into the layout that its kernels read.
///
/// out = residual + scale * act(x W^T + bias). FLOPs 2*M*N*K; floor: FLOPs over the FMA peak.
#pragma once

#include <memory>

#include "native/core/tensor.h"
#include "native/ops/linear.h"

namespace uniflow::cpu {

/// Blocking of a weight [out, in] for products in `dtype`. Without bfloat16 arithmetic in the machine,
/// a bfloat16 layer is stored and computed in float32.
std::shared_ptr<const Packing> linear_packing(int64_t out, int64_t in, DType dtype);
int64_t packed_bytes(const Packing& packing);

/// plain [out, in] of `dtype` -> packed, and back.
void pack(const Packing& packing, const void* plain, DType dtype, void* packed);
void unpack(const Packing& packing, const void* packed, void* plain, DType dtype);

struct LinearArgs {
  const void* x;       // [rows, in]
  const void* weight;  // packed
  const Packing* packing;
  void* out;               // [rows, out]
  int64_t rows;
  DType x_dtype, out_dtype;
  const float* bias = nullptr;      // [out]
  const float* scale = nullptr;     // [out]
  const void* residual = nullptr;   // [rows, out], of out_dtype; may be out
  Activation activation = Activation::None;
};

void linear(const LinearArgs& args);

/// "oneDNN 2.6.3, brg:avx512_core_bf16" and whether bfloat16 products are native here.
std::string linear_backend();
bool native_bfloat16();

}  // namespace uniflow::cpu
