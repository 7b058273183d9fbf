/// Conversions for shards, on the host: 16-bit storage and statistics. Each call runs on one thread.
#pragma once

#include <cstdint>
#include <span>

namespace uniflow {

/// A file's 16-bit number format.
enum class Half : uint8_t { Float16, BFloat16 };

/// Rounds to nearest, ties to even. `bits` has the same number of elements. Throws Error (Unsupported) for values that float16 cannot
/// represent: NaN, and 65520 and above.
void store(std::span<const float> values, Half type, uint16_t* bits);

/// Converts stored numbers back, exactly.
void restore(std::span<const uint16_t> bits, Half type, float* values);

/// Per channel of values [count, channels]: the mean, and the sum of squared deviations from it. Two passes in float64.
void moments(std::span<const float> values, int64_t channels, double* mean, double* squares);

/// Adds one to counts[group, code] for each of codes [tokens, groups]; `counts` has the same number of codes for each group, and all that
/// occur.
void count_codes(std::span<const int32_t> codes, int64_t groups, std::span<int32_t> counts);

}  // namespace uniflow
