/// Matrix products through cuBLASLt, each with the fastest algorithm on this device.
#pragma once

#include <functional>

#include "native/core/dtype.h"

namespace uniflow::cuda {

/// out [rows, columns] = epilogue(a b + add), all in C order, sums in float32 (of Float8 in fewer bits). FLOPs 2 * rows * inner * columns.
struct Product {
  const void* a;  // [rows, inner], or stored as [inner, rows]
  const void* b;  // [inner, columns], or stored as [columns, inner]
  void* out;      // [rows, columns]
  int64_t rows, inner, columns;
  DType dtype, out_dtype;  // of a and b: Float32, BFloat16 or Float8; of out: Float32 or BFloat16, but Float32 if a and b are
  bool a_transposed = false, b_transposed = false;
  // The epilogue, in this order:
  const float* a_scale = nullptr;  // [rows] and
  const float* b_scale = nullptr;  // [columns], for Float8 only, both or neither: factors of the product's rows and columns
  const void* add = nullptr;       // [rows, columns] in out_dtype; out itself, or not overlapping it
  const void* bias = nullptr;      // [columns], 16-byte aligned
  DType bias_dtype = DType::Float32;
  bool gelu_tanh = false;
};

/// Queues the product, in parts if its operands are very large; a transposed must be without an epilogue. Returns false if cuBLASLt has
/// no algorithm for it; `out` is undefined then.
///
/// The first product of about these sizes, and of these types and alignments, times its algorithms, and the host waits for that. While a
/// Graph is recorded, the library's guess is used instead. An algorithm gives the same bits in every run, but the fastest one can change
/// from process to process.
bool multiply(const Product& p);

/// The same without epilogue (a_scale and all fields after it), by a kernel of ours that takes every size and alignment. Some 20 times
/// slower than cuBLASLt: for products that it refuses.
void multiply_tiled(const Product& p);

/// Time that the device takes for the work queued by `work`. Waits.
float milliseconds_of(const std::function<void()>& work);

}  // namespace uniflow::cuda
