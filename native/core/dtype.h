/// Element types, and the bfloat16 conversions that every backend agrees on.
#pragma once

#include <bit>
#include <cstdint>

namespace uniflow {

/// Float8 (e4m3) on a GPU and Int8 on the CPU store packed linear weights; no other tensors have them.
enum class DType : uint8_t { Float32, BFloat16, UInt8, Int32, Float8, Int8 };

constexpr int64_t size_of(DType t) {
  switch (t) {
    case DType::Float32:
    case DType::Int32: return 4;
    case DType::BFloat16: return 2;
    case DType::UInt8:
    case DType::Float8:
    case DType::Int8: return 1;
  }
  return 0;
}

inline const char* name_of(DType t) {
  switch (t) {
    case DType::Float32: return "float32";
    case DType::BFloat16: return "bfloat16";
    case DType::UInt8: return "uint8";
    case DType::Int32: return "int32";
    case DType::Float8: return "float8";
    case DType::Int8: return "int8";
  }
  return "?";
}

/// bfloat16 as stored: the upper half of a float32.
struct bf16 {
  uint16_t bits;
};

constexpr float to_float(bf16 v) { return std::bit_cast<float>(uint32_t{v.bits} << 16); }
constexpr float to_float(float v) { return v; }

/// Rounds to nearest, ties to even; NaN stays NaN.
constexpr bf16 to_bf16(float v) {
  uint32_t u = std::bit_cast<uint32_t>(v);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((u >> 16) | 0x40)};
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

/// Calls f.operator()<T>() with the type of `dtype`, Float32 or BFloat16.
template <class F>
decltype(auto) dispatch_float(DType dtype, F&& f) {
  return dtype == DType::BFloat16 ? f.template operator()<bf16>() : f.template operator()<float>();
}

}  // namespace uniflow
