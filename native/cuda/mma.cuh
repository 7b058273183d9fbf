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
///
/// The emulated functions implement these definitions directly. Every other asynchronous copy arrives at once, which exposes kernels that
/// overwrite data still being read. The others arrive only when they are waited for, which exposes kernels that read too early.
#pragma once

#ifdef UNIFLOW_EMULATED
#include <algorithm>
#include <cstring>
#endif

#include "native/cuda/device.cuh"

namespace uniflow::cuda {

#ifndef UNIFLOW_EMULATED

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

#else

inline float bf16_in(uint32_t pair, int half) { return __uint_as_float(half == 0 ? pair << 16 : pair & 0xffff0000u); }

inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Fragments {
    uint32_t a[4], b[2];
  };
  const Fragments* const lanes = emulator::warp_exchange(Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const int group = emulator::lane_id() / 4, thread = emulator::lane_id() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = group + 8 * (i / 2), column = 2 * thread + i % 2;
    for (int k = 0; k < 16; ++k) {  // the lane and the register that hold A[row][k], and B[k][column]
      const float left = bf16_in(lanes[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2], k % 2);
      const float right = bf16_in(lanes[column * 4 + k % 8 / 2].b[k / 8], k % 2);
      c[i] += left * right;
    }
  }
}

/// Element (row, column) of an 8 x 8 matrix, whose row addresses come from the lanes in `addresses`.
inline uint32_t bf16_at(const void* const* addresses, int matrix, int row, int column) {
  return static_cast<const uint16_t*>(addresses[matrix * 8 + row])[column];
}

inline const void* const* row_addresses(const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulator::die("ldmatrix of a row that is not aligned to 16 bytes");
  return emulator::warp_exchange(row);
}

inline void ldmatrix_x4(uint32_t (&out)[4], const void* row) {
  const void* const* const addresses = row_addresses(row);
  const int group = emulator::lane_id() / 4, thread = emulator::lane_id() % 4;
  for (int r = 0; r < 4; ++r) out[r] = bf16_at(addresses, r, group, 2 * thread) | bf16_at(addresses, r, group, 2 * thread + 1) << 16;
}

inline void ldmatrix_x4_trans(uint32_t (&out)[4], const void* row) {
  const void* const* const addresses = row_addresses(row);
  const int group = emulator::lane_id() / 4, thread = emulator::lane_id() % 4;
  for (int r = 0; r < 4; ++r) out[r] = bf16_at(addresses, r, 2 * thread, group) | bf16_at(addresses, r, 2 * thread + 1, group) << 16;
}

inline void cp_async_16(void* to, const void* from, bool valid = true) {
  static thread_local unsigned copies = 0;
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || (valid && reinterpret_cast<uintptr_t>(from) % 16 != 0))
    emulator::die("an asynchronous copy that is not aligned to 16 bytes");
  const auto copy = [=] {
    if (valid) std::memcpy(to, from, 16);
    else std::memset(to, 0, 16);
  };
  if (++copies % 2 == 0) copy();
  else emulator::deferred().push_back(copy);
}

/// An empty entry marks the end of a group.
inline void cp_async_commit() { emulator::deferred().push_back(nullptr); }

template <int kPending>
inline void cp_async_wait() {
  auto& entries = emulator::deferred();
  auto groups = std::count(entries.begin(), entries.end(), nullptr);
  auto entry = entries.begin();
  for (; groups > kPending; ++entry) {
    if (*entry) (*entry)();
    else --groups;
  }
  entries.erase(entries.begin(), entry);
}

inline float exp2_approx(float x) { return exp2f(x); }

#endif

}  // namespace uniflow::cuda
