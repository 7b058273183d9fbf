#include "native/core/shard.h"

#include <algorithm>
#include <cstdio>

#include "native/core/dtype.h"
#include "native/core/error.h"
#include "native/core/half.h"

namespace uniflow {

void store(std::span<const float> values, Half type, uint16_t* bits) {
  if (type == Half::BFloat16) {
    std::ranges::transform(values, bits, [](float v) { return to_bf16(v).bits; });
    return;
  }
  if (const auto large = std::ranges::find_if_not(values, fits_half); large != values.end()) {
    char text[32];
    std::snprintf(text, sizeof text, "%.7g", double{*large});
    throw Error(ErrorCode::Unsupported, "store", "numbers below 65520 for float16 (bfloat16 holds larger ones)", text);
  }
  std::ranges::transform(values, bits, float_to_half);
}

void restore(std::span<const uint16_t> bits, Half type, float* values) {
  if (type == Half::BFloat16) std::ranges::transform(bits, values, [](uint16_t b) { return to_float(bf16{b}); });
  else std::ranges::transform(bits, values, half_to_float);
}

void moments(std::span<const float> values, int64_t channels, double* mean, double* squares) {
  const auto each_row = [&](auto body) {
    for (size_t at = 0; at < values.size(); at += static_cast<size_t>(channels))
      for (int64_t c = 0; c < channels; ++c) body(c, double{values[at + static_cast<size_t>(c)]});
  };
  std::fill_n(mean, channels, 0.0);
  std::fill_n(squares, channels, 0.0);
  each_row([=](int64_t c, double v) { mean[c] += v; });
  const auto count = static_cast<double>(values.size()) / static_cast<double>(channels);
  for (int64_t c = 0; c < channels; ++c) mean[c] /= count;
  each_row([=](int64_t c, double v) { squares[c] += (v - mean[c]) * (v - mean[c]); });
}

void count_codes(std::span<const int32_t> codes, int64_t groups, std::span<int32_t> counts) {
  const size_t all = static_cast<size_t>(groups), each = counts.size() / all;
  for (size_t i = 0; i < codes.size(); ++i) ++counts[i % all * each + static_cast<size_t>(codes[i])];
}

}  // namespace uniflow
