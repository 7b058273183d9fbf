/// What a shard keeps of results that are on the host: their form in 16 bits, and their statistics. Each call runs on one thread.
#pragma once

#include <cstdint>
#include <span>

namespace uniflow {

/// How a file stores a number in 16 bits.
enum class Half : uint8_t { Float16, BFloat16 };

/// Rounds to nearest, ties to even. `bits` has as many elements. Throws Error (Unsupported) for what float16 cannot hold: NaN, and 65520 and above.
void store(std::span<const float> values, Half type, uint16_t* bits);

/// The numbers that were stored, exactly.
void restore(std::span<const uint16_t> bits, Half type, float* values);

/// Of each channel of values [count, channels]: the mean, and the sum of squared distances from it. Two passes in float64.
void moments(std::span<const float> values, int64_t channels, double* mean, double* squares);

}  // namespace uniflow
