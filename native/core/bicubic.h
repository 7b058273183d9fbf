/// Weights of bicubic resizing along one dimension, as in PyTorch's interpolate with align_corners = false.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace uniflow {

/// An input position and its weight in the output.
struct Tap {
  int32_t index;
  float weight;
};

static inline float cubic(float x, float a) {
  x = std::fabs(x);
  if (x <= 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? ((a * x - 5 * a) * x + 8 * a) * x - 4 * a : 0;
}

/// Taps of output position i when resizing from `in` to `out` positions: four, a = -0.75; borders repeat.
static inline std::vector<Tap> plain_taps(int64_t i, int64_t in, int64_t out) {
  const float at = (static_cast<float>(i) + 0.5f) * (static_cast<float>(in) / static_cast<float>(out)) - 0.5f;
  const float base = std::floor(at);
  std::vector<Tap> taps;
  for (int k = -1; k <= 2; ++k)
    taps.push_back({static_cast<int32_t>(std::clamp<int64_t>(static_cast<int64_t>(base) + k, 0, in - 1)),
                    cubic(at - base - static_cast<float>(k), -0.75f)});
  return taps;
}

/// Taps of the antialiased filter: a = -0.5, widened when shrinking, cut at the borders and normalised.
static inline std::vector<Tap> antialiased_taps(int64_t i, int64_t in, int64_t out) {
  const float scale = static_cast<float>(in) / static_cast<float>(out), stretch = std::max(scale, 1.0f);
  const float centre = scale * (static_cast<float>(i) + 0.5f), support = 2 * stretch;
  const auto begin = std::max<int64_t>(static_cast<int64_t>(centre - support + 0.5f), 0);
  const auto end = std::min<int64_t>(static_cast<int64_t>(centre + support + 0.5f), in);
  std::vector<Tap> taps;
  float total = 0;
  for (int64_t k = begin; k < end; ++k) {
    taps.push_back({static_cast<int32_t>(k), cubic((static_cast<float>(k) - centre + 0.5f) / stretch, -0.5f)});
    total += taps.back().weight;
  }
  for (Tap& tap : taps) tap.weight /= total;
  return taps;
}

}  // namespace uniflow
