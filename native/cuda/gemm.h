/// Matrix products through cuBLASLt, each by the algorithm that was fastest on this device.
#pragma once

#include <functional>

#include "native/core/dtype.h"

namespace uniflow::cuda {

/// out [rows, columns] = epilogue(a b + add), all in C order, sums in float32. FLOPs 2 * rows * inner * columns.
struct Product {
  const void* a;  // [rows, inner], or stored as [inner, rows]
  const void* b;  // [inner, columns], or stored as [columns, inner]
  void* out;      // [rows, columns]
  int64_t rows, inner, columns;
  DType dtype, out_dtype;  // of a and b: Float32, BFloat16 or Float8; of out: Float32 or BFloat16, no narrower than float32 from float32
  bool a_transposed = false, b_transposed = false;
  // The epilogue, in this order:
  const float* a_scale = nullptr;  // [rows] and
  const float* b_scale = nullptr;  // [columns], of Float8 only, both or neither: the product's rows and columns are multiplied by them
  const void* add = nullptr;       // [rows, columns] of out_dtype; not out itself
  const void* bias = nullptr;      // [columns], 16-byte aligned
  DType bias_dtype = DType::Float32;
  bool gelu_tanh = false;
};

/// Queues it. False, with nothing queued, where cuBLASLt has no algorithm for just this.
///
/// The first time that a product of these sizes, types and alignments comes, its algorithms are timed, for which the host waits; not while
/// a Graph is recorded, when the library's guess is taken. Results are the same bits in every run of one algorithm; which one is the
/// fastest can change from process to process.
bool multiply(const Product& p);

/// How long the device takes for what `work` queues. Waits.
float milliseconds_of(const std::function<void()>& work);

}  // namespace uniflow::cuda
