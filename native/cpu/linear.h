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

/// The "blocking" of a weight that stays as it is, [out, in] in C order: what training uses, where weights change every step and
/// repacking them would cost more than it saves.
std::shared_ptr<const Packing> plain_packing(int64_t out, int64_t in, DType dtype);

/// A tensor's own packing, or the plain one.
std::shared_ptr<const Packing> packing_of(const Tensor& weight);

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
  const void* residual = nullptr;   // [rows, out], of out_dtype; not out itself
  Activation activation = Activation::None;
};

void linear(const LinearArgs& args);

/// Gradients of out = x W^T + b. FLOPs 2*M*N*K each.
struct LinearBackwardArgs {
  const void* x;       // [rows, in]
  const void* weight;  // [out, in] plain
  const void* d_out;   // [rows, out]
  DType dtype;         // of x, weight, d_out, d_x
  int64_t rows, in, out;
  void* d_x = nullptr;         // [rows, in], or not asked for
  float* d_weight = nullptr;   // [out, in], or not asked for
  float* d_bias = nullptr;     // [out], or not asked for
};

void linear_backward(const LinearBackwardArgs& args);

/// "oneDNN 2.6.3, brg:avx512_core_bf16" and whether bfloat16 products are native here.
std::string linear_backend();
bool native_bfloat16();

}  // namespace uniflow::cpu
