/// Tensor cores and asynchronous copies: PTX instructions without an equivalent in CUDA C++, one thin function each. sm_80 and newer.
///
/// Layouts, from the PTX ISA, with group = lane / 4 and thread = lane % 4. Every register holds two bfloat16, the lower column (or row, in
/// B) in the lower half. One mma of a warp multiplies A [16, 16] by B [16, 8] into C [16, 8]:
///   A, four registers:   row group + 8 * (r % 2), columns 2 * thread + {0, 1} + 8 * (r / 2)   of register r
///   B, two registers:    rows 2 * thread + {0, 1} + 8 * r, column group
///   C, four floats:      row group + 8 * (i / 2), column 2 * thread + i % 2                   of float i
/// Two neighbouring C, rounded, form one A: the result of a product is the left side of the next without leaving its registers.
///
/// ldmatrix reads four 8 x 8 matrices of bfloat16 from shared memory; lane l provides the address of row l % 8 of matrix l / 8. Register r
/// then holds from matrix r: row group, columns 2 * thread + {0, 1}; or, transposed, rows 2 * thread + {0, 1} of column group.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace uniflow::cuda {

/// c += a b.
__device__ inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

/// `row`: this lane's, 16 bytes of shared memory, aligned.
__device__ inline void ldmatrix_x4(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ inline void ldmatrix_x4_trans(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

/// Copies 16 aligned bytes from global to shared memory, bypassing the registers and the first-level cache. If not `valid`, it writes zeros
/// and does not read `from`.
__device__ inline void cp_async_16(void* to, const void* from, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

/// Ends a group of this thread's copies.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Waits until all groups of this thread except the last kPending have arrived. Other threads see them after a barrier.
template <int kPending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

/// 2^x to about 2 units in the last place; denormal results become zero.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace uniflow::cuda
