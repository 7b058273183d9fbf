/// Levels of finite scalar quantisation: Mentzer, Minnen, Agustsson and Tschannen 2023, arXiv 2309.15505.
#pragma once

#include <cstdint>

namespace uniflow {

constexpr int32_t kMostLevelChannels = 16;  // two levels each already make 65,536 codes
constexpr int32_t kMostLevels = 256;        // bfloat16 keeps the latents of as many apart
constexpr int32_t kMostCodes = 65536;

/// One channel of a group. A projection x becomes the digit round(range * tanh(x + shift) - offset), from -half to level - 1 - half; the
/// latent is digit / half. An even number of levels has no middle: the offset of half a level and the shift map x = 0 to 0.
struct Level {
  int32_t level, half;
  int32_t radix;  // product of the levels before it
  float shift, range, offset;
};

/// The channels of a group, in the order of the latents. code = sum over the channels of (digit + half) * radix.
struct Levels {
  int32_t count;
  int32_t codes;  // product of all levels
  Level channel[kMostLevelChannels];
};

}  // namespace uniflow
