/// Twin of native/cuda/hardware/mma.cuh, whose definitions the functions implement directly.
///
/// Every other asynchronous copy arrives at once, which exposes kernels that
/// overwrite data still being read. The others arrive only when they are waited for, which exposes kernels that read too early.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace uniflow::cuda {

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

}  // namespace uniflow::cuda
