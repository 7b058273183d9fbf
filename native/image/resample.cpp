#include "native/image/resample.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <numbers>
#include <string>
#include <string_view>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "native/core/error.h"

namespace uniflow {
namespace {

constexpr int kChannels = 3;
constexpr int kFractionBits = 22;  // Pillow's PRECISION_BITS: 32 - 8 bits of pixel - 2 bits for overshoot
constexpr int32_t kOne = 1 << kFractionBits;
constexpr int32_t kHalf = kOne / 2;

/// Row kernels read and write whole vectors, so every scratch row ends with this many spare bytes.
constexpr int kRowPadding = 64;

// ---------------------------------------------------------------------------------------------------
// Row kernels. Integer arithmetic only, so every instruction set gives the same bytes.
// ---------------------------------------------------------------------------------------------------

/// The weights of four neighbouring pixels, in the order in which the AVX2 kernel multiplies. Each weight has 23 bits and is split into two
/// 16-bit factors. Weights 0 and 1 are interleaved for R, G, B and padding, then weights 2 and 3.
struct alignas(32) Quad {
  static constexpr int kLowBits = 11;
  int16_t high[16];
  int16_t low[16];

  int32_t weight(int tap) const {
    const int i = tap / 2 * 8 + tap % 2;
    return high[i] * (1 << kLowBits) + low[i];
  }
  void set_weight(int tap, int32_t weight) {
    for (int channel = 0; channel < kChannels; ++channel) {
      const int i = tap / 2 * 8 + channel * 2 + tap % 2;
      high[i] = static_cast<int16_t>(weight >> kLowBits);
      low[i] = static_cast<int16_t>(weight & ((1 << kLowBits) - 1));
    }
  }
};

/// Neighbouring outputs of a row, each a weighted sum of neighbouring input pixels.
struct PixelSums {
  int32_t count;         // number of outputs
  const int32_t* start;  // first input pixel of each output
  const int32_t* quads;  // number of quads of taps of each output
  const Quad* weights;   // `stride` quads per output
  int64_t stride;
};

uint8_t to_pixel(int32_t sum) { return static_cast<uint8_t>(std::clamp(sum >> kFractionBits, 0, 255)); }

void weigh_pixels(const uint8_t* in, const PixelSums& sums, uint8_t* out) {
  for (int32_t i = 0; i < sums.count; ++i, out += kChannels) {
    const uint8_t* pixel = in + int64_t{kChannels} * sums.start[i];
    const Quad* quad = sums.weights + i * sums.stride;
    int32_t rgb[kChannels] = {kHalf, kHalf, kHalf};
    for (int32_t tap = 0; tap < 4 * sums.quads[i]; ++tap, pixel += kChannels) {
      const int32_t weight = quad[tap / 4].weight(tap % 4);
      for (int c = 0; c < kChannels; ++c) rgb[c] += pixel[c] * weight;
    }
    for (int c = 0; c < kChannels; ++c) out[c] = to_pixel(rgb[c]);
  }
}

/// out[x] = sum over the rows of rows[t][x] * weights[t].
void weigh_rows(const uint8_t* const* rows, const int32_t* weights, int32_t count, int64_t bytes, uint8_t* out) {
  constexpr int kBlock = 64;
  for (int64_t x = 0; x < bytes; x += kBlock) {
    int32_t sums[kBlock];
    for (int32_t& sum : sums) sum = kHalf;
    for (int32_t t = 0; t < count; ++t) {
      for (int i = 0; i < kBlock; ++i) sums[i] += rows[t][x + i] * weights[t];
    }
    for (int i = 0; i < kBlock; ++i) out[x + i] = to_pixel(sums[i]);
  }
}

/// The two taps of a halving: the fixed-point sum equals (a + b + 1) / 2.
[[gnu::always_inline]] inline void average(const uint8_t* a, const uint8_t* b, int64_t bytes, uint8_t* out) {
  for (int64_t x = 0; x < bytes; ++x) out[x] = static_cast<uint8_t>((a[x] + b[x] + 1) >> 1);
}

void average_rows(const uint8_t* a, const uint8_t* b, int64_t bytes, uint8_t* out) { average(a, b, bytes, out); }

/// out[i] = average of the pixels 2i and 2i + 1.
[[gnu::always_inline]] inline void average_pairs(const uint8_t* in, int32_t count, uint8_t* out) {
  constexpr int32_t kBlock = 64;
  uint8_t averages[2 * kChannels * kBlock];  // averages of each pixel with the next; every other one is used
  for (int32_t first = 0; first < count; first += kBlock) {
    const int32_t n = std::min(kBlock, count - first);
    const uint8_t* pixel = in + int64_t{2 * kChannels} * first;
    average(pixel, pixel + kChannels, int64_t{2 * kChannels} * n, averages);
    // Copying four bytes is a single move; the next pixel overwrites the fourth, or it is padding.
    for (int32_t i = 0; i < n; ++i, out += kChannels) std::memcpy(out, averages + 2 * kChannels * i, 4);
  }
}

void average_pixels(const uint8_t* in, int32_t count, uint8_t* out) { average_pairs(in, count, out); }

struct RowKernels {
  void (*weigh_pixels)(const uint8_t* in, const PixelSums& sums, uint8_t* out);
  void (*weigh_rows)(const uint8_t* const* rows, const int32_t* weights, int32_t count, int64_t bytes, uint8_t* out);
  void (*average_rows)(const uint8_t* a, const uint8_t* b, int64_t bytes, uint8_t* out);
  void (*average_pixels)(const uint8_t* in, int32_t count, uint8_t* out);
};

constexpr RowKernels kPortable = {weigh_pixels, weigh_rows, average_rows, average_pixels};

#if defined(__x86_64__)
#define UNIFLOW_AVX2 [[gnu::target("avx2")]]

UNIFLOW_AVX2 void weigh_pixels_avx2(const uint8_t* in, const PixelSums& sums, uint8_t* out) {
  // Four pixels of three bytes to 16-bit pairs: R0 R1 G0 G1 B0 B1 0 0 | R2 R3 G2 G3 B2 B3 0 0.
  const __m256i order = _mm256_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1,  //
                                         6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1);
  const __m128i half = _mm_set1_epi32(kHalf);
  for (int32_t i = 0; i < sums.count; ++i, out += kChannels) {
    const uint8_t* pixel = in + int64_t{kChannels} * sums.start[i];
    const Quad* quad = sums.weights + i * sums.stride;
    const Quad* end = quad + sums.quads[i];
    __m256i high = _mm256_setzero_si256(), low = high;
    for (; quad != end; ++quad, pixel += 4 * kChannels) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(pixel));
      const __m256i pairs = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes), order);
      high = _mm256_add_epi32(high, _mm256_madd_epi16(pairs, *reinterpret_cast<const __m256i*>(quad->high)));
      low = _mm256_add_epi32(low, _mm256_madd_epi16(pairs, *reinterpret_cast<const __m256i*>(quad->low)));
    }
    const __m256i both = _mm256_add_epi32(_mm256_slli_epi32(high, Quad::kLowBits), low);
    __m128i rgb = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    rgb = _mm_srai_epi32(_mm_add_epi32(rgb, half), kFractionBits);
    rgb = _mm_packus_epi16(_mm_packs_epi32(rgb, rgb), rgb);
    const int32_t bytes = _mm_cvtsi128_si32(rgb);
    std::memcpy(out, &bytes, sizeof bytes);  // the next pixel overwrites the fourth byte, or it is padding
  }
}

UNIFLOW_AVX2 void weigh_rows_avx2(const uint8_t* const* rows, const int32_t* weights, int32_t count, int64_t bytes,
                                  uint8_t* out) {
  constexpr int kVectors = 4;
  for (int64_t x = 0; x < bytes; x += 8 * kVectors) {
    __m256i sums[kVectors];
    for (__m256i& sum : sums) sum = _mm256_set1_epi32(kHalf);
    for (int32_t t = 0; t < count; ++t) {
      const __m256i weight = _mm256_set1_epi32(weights[t]);
      for (int v = 0; v < kVectors; ++v) {
        const auto* in = reinterpret_cast<const __m128i*>(rows[t] + x + 8 * v);
        const __m256i pixels = _mm256_cvtepu8_epi32(_mm_loadl_epi64(in));
        sums[v] = _mm256_add_epi32(sums[v], _mm256_mullo_epi32(pixels, weight));
      }
    }
    for (__m256i& sum : sums) sum = _mm256_srai_epi32(sum, kFractionBits);
    // Packing works on each half of a vector separately, so groups of four bytes come out in the order 0 2 4 6 1 3 5 7.
    const __m256i first = _mm256_packs_epi32(sums[0], sums[1]), second = _mm256_packs_epi32(sums[2], sums[3]);
    const __m256i packed = _mm256_packus_epi16(first, second);
    const __m256i ordered = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + x), ordered);
  }
}

UNIFLOW_AVX2 void average_rows_avx2(const uint8_t* a, const uint8_t* b, int64_t bytes, uint8_t* out) {
  average(a, b, bytes, out);
}

UNIFLOW_AVX2 void average_pixels_avx2(const uint8_t* in, int32_t count, uint8_t* out) { average_pairs(in, count, out); }

constexpr RowKernels kAvx2 = {weigh_pixels_avx2, weigh_rows_avx2, average_rows_avx2, average_pixels_avx2};
#endif

/// AVX2 if the machine supports it; UNIFLOW_ISA=portable disables it, as for the other kernels.
const RowKernels& row_kernels() {
#if defined(__x86_64__)
  static const bool avx2 = [] {
    const char* isa = std::getenv("UNIFLOW_ISA");
    return __builtin_cpu_supports("avx2") && !(isa && std::string_view(isa) == "portable");
  }();
  if (avx2) return kAvx2;
#endif
  return kPortable;
}

// ---------------------------------------------------------------------------------------------------
// Weights
// ---------------------------------------------------------------------------------------------------

double support_of(Filter filter) {
  switch (filter) {
    case Filter::Box: return 0.5;
    case Filter::Bilinear: return 1.0;
    case Filter::Bicubic: return 2.0;
    case Filter::Lanczos: return 3.0;
  }
  return 0;
}

double sinc(double x) {
  if (x == 0) return 1;
  x *= std::numbers::pi;
  return std::sin(x) / x;
}

/// The filter at x, with Pillow's order of operations: the last bit of a weight depends on it.
double value_of(Filter filter, double x) {
  if (filter == Filter::Box) return x > -0.5 && x <= 0.5 ? 1 : 0;
  if (filter == Filter::Lanczos) return -3 <= x && x < 3 ? sinc(x) * sinc(x / 3) : 0;
  x = std::abs(x);
  if (filter == Filter::Bilinear) return x < 1 ? 1 - x : 0;
  constexpr double a = -0.5;
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
  return 0;
}

/// A range of pixels along one dimension.
struct Range {
  int64_t first;
  int64_t count;
};

/// The smallest range that contains both.
Range join(Range a, Range b) {
  const int64_t first = std::min(a.first, b.first);
  return {first, std::max(a.first + a.count, b.first + b.count) - first};
}

/// Scratch memory and results of weigh().
struct Weights {
  std::vector<double> exact;
  std::vector<int32_t> fixed;
};

/// Upper bound of the number of inputs per output.
int64_t most_weights(int64_t in_size, int64_t out_size, Filter filter) {
  const double scale = static_cast<double>(in_size) / static_cast<double>(out_size);
  return static_cast<int64_t>(2 * support_of(filter) * std::max(scale, 1.0)) + 2;
}

/// Computes the weights of output i without leading and trailing zeros; returns the range of inputs they apply to.
Range weigh(int64_t i, int64_t in_size, int64_t out_size, Filter filter, Weights& weights) {
  const double scale = static_cast<double>(in_size) / static_cast<double>(out_size);
  const double filter_scale = std::max(scale, 1.0);
  const double support = support_of(filter) * filter_scale;
  const double center = (static_cast<double>(i) + 0.5) * scale;
  const int64_t begin = std::max<int64_t>(static_cast<int64_t>(center - support + 0.5), 0);
  const int64_t end = std::min<int64_t>(static_cast<int64_t>(center + support + 0.5), in_size);

  weights.exact.clear();
  double total = 0;
  for (int64_t x = begin; x < end; ++x) {
    weights.exact.push_back(value_of(filter, (static_cast<double>(x) - center + 0.5) * (1.0 / filter_scale)));
    total += weights.exact.back();
  }
  auto& fixed = weights.fixed;
  fixed.clear();
  int64_t zeros = 0;
  for (const double w : weights.exact) {
    const double scaled = total == 0 ? 0 : w / total * kOne;  // a box may miss every pixel; the output is then black
    fixed.push_back(static_cast<int32_t>(scaled + (scaled < 0 ? -0.5 : 0.5)));
    if (fixed.size() == 1 && fixed.back() == 0) {
      fixed.clear();
      ++zeros;
    }
  }
  while (fixed.size() > 1 && fixed.back() == 0) fixed.pop_back();
  return {begin + zeros, static_cast<int64_t>(fixed.size())};
}

/// Whether the weights are those of an exact halving.
bool is_average(const int32_t* weights, int64_t count) {
  return count == 2 && weights[0] == kHalf && weights[1] == kHalf;
}

// ---------------------------------------------------------------------------------------------------
// Stages: one resize each, chained by rows
// ---------------------------------------------------------------------------------------------------

/// Source of a stage's rows: the input image, or the previous stage.
class Rows {
 public:
  virtual ~Rows() = default;
  /// Row y, starting at the first requested column; valid until the next call. y must not decrease between calls.
  virtual const uint8_t* row(int64_t y) = 0;
};

/// The rows of the input image.
class PictureRows : public Rows {
 public:
  void open(const ImageView& picture, Range columns) {
    picture_ = picture;
    offset_ = columns.first * kChannels;
    bytes_ = columns.count * kChannels;
    end_ = picture.data + (picture.height - 1) * picture.stride + int64_t{kChannels} * picture.width;
    copy_.resize(static_cast<size_t>(bytes_ + kRowPadding));
  }

  const uint8_t* row(int64_t y) override {
    const uint8_t* pixels = picture_.data + static_cast<size_t>(y) * picture_.stride + offset_;
    if (end_ - pixels >= bytes_ + kRowPadding) return pixels;
    std::memcpy(copy_.data(), pixels, static_cast<size_t>(bytes_));  // the end of the image has no padding
    return copy_.data();
  }

 private:
  ImageView picture_{};
  int64_t offset_ = 0, bytes_ = 0;
  const uint8_t* end_ = nullptr;
  std::vector<uint8_t> copy_;
};

struct Size {
  int64_t width, height;
  bool operator==(const Size&) const = default;
};

struct Rect {
  Range columns, rows;
};

/// The horizontal pass of a stage, one row at a time.
class HorizontalPass {
 public:
  void plan(int64_t in_size, int64_t out_size, Filter filter, Range outputs);
  /// The input columns that it reads; row pointers passed to run() point to the first of them.
  Range inputs() const { return inputs_; }
  void run(const uint8_t* in, uint8_t* out) const;

 private:
  void plan_weights(int64_t in_size, int64_t out_size, Filter filter, Range outputs);
  void plan_spans(bool halving);

  /// Neighbouring outputs computed by the same kernel.
  struct Span {
    int32_t first, count;
    bool average;
  };

  Range inputs_{};
  bool copies_ = false;
  std::vector<Span> spans_;
  std::vector<int32_t> start_, quads_;  // as in PixelSums, like the next two
  std::vector<Quad> weights_;
  int64_t stride_ = 0;
  Weights scratch_;
};

void HorizontalPass::plan(int64_t in_size, int64_t out_size, Filter filter, Range outputs) {
  copies_ = in_size == out_size;
  if (copies_) {
    inputs_ = outputs;
    return;
  }
  plan_weights(in_size, out_size, filter, outputs);
  plan_spans(filter == Filter::Box && in_size / 2 == out_size);
}

void HorizontalPass::plan_weights(int64_t in_size, int64_t out_size, Filter filter, Range outputs) {
  stride_ = (most_weights(in_size, out_size, filter) + 3) / 4;
  weights_.assign(static_cast<size_t>(stride_ * outputs.count), Quad{});
  start_.resize(static_cast<size_t>(outputs.count));
  quads_.resize(start_.size());
  for (size_t i = 0; i < start_.size(); ++i) {
    const Range window = weigh(outputs.first + static_cast<int64_t>(i), in_size, out_size, filter, scratch_);
    inputs_ = i == 0 ? window : join(inputs_, window);
    start_[i] = static_cast<int32_t>(window.first);
    quads_[i] = static_cast<int32_t>((window.count + 3) / 4);
    Quad* quads = weights_.data() + static_cast<int64_t>(i) * stride_;
    for (int tap = 0; tap < window.count; ++tap) {
      quads[tap / 4].set_weight(tap % 4, scratch_.fixed[static_cast<size_t>(tap)]);
    }
  }
  for (int32_t& start : start_) start -= static_cast<int32_t>(inputs_.first);
}

/// Halving an odd size also averages pairs of pixels, except for one output in the middle, which takes three.
void HorizontalPass::plan_spans(bool halving) {
  spans_.clear();
  for (size_t i = 0; i < start_.size(); ++i) {
    const Quad& quad = weights_[i * static_cast<size_t>(stride_)];
    const bool average = halving && quad.weight(0) == kHalf && quad.weight(1) == kHalf;
    if (!spans_.empty() && spans_.back().average == average && (!average || start_[i] == start_[i - 1] + 2)) {
      ++spans_.back().count;
    } else {
      spans_.push_back({static_cast<int32_t>(i), 1, average});
    }
  }
}

void HorizontalPass::run(const uint8_t* in, uint8_t* out) const {
  if (copies_) {
    std::memcpy(out, in, static_cast<size_t>(inputs_.count * kChannels));
    return;
  }
  const RowKernels& kernels = row_kernels();
  for (const Span& span : spans_) {
    uint8_t* pixels = out + int64_t{kChannels} * span.first;
    const int32_t* start = start_.data() + span.first;
    if (span.average) {
      kernels.average_pixels(in + int64_t{kChannels} * *start, span.count, pixels);
    } else {
      const Quad* weights = weights_.data() + span.first * stride_;
      kernels.weigh_pixels(in, {span.count, start, quads_.data() + span.first, weights, stride_}, pixels);
    }
  }
}

/// One resize. Each input row passes through the horizontal pass once, into a ring of rows as deep as the vertical filter is high. An
/// output row is a weighted sum of rows in the ring.
class Stage : public Rows {
 public:
  void plan(Size in, Size out, Filter filter, Rect wanted);
  /// The part of the input needed for the requested part of the output.
  Rect inputs() const { return {horizontal_.inputs(), inputs_}; }
  void read_from(Rows& source) { source_ = &source; }
  const uint8_t* row(int64_t y) override;

 private:
  uint8_t* ring_row(int64_t y) { return ring_.data() + y % ring_rows_ * stride_; }

  Rows* source_ = nullptr;
  HorizontalPass horizontal_;
  Range inputs_{};
  int64_t first_output_ = 0, bytes_ = 0, stride_ = 0;
  int64_t ring_rows_ = 0, next_input_ = 0;
  std::vector<Range> windows_;    // per output row
  std::vector<int32_t> weights_;  // ring_rows_ weights per output row
  std::vector<uint8_t> ring_, out_;
  std::vector<const uint8_t*> taps_;
  Weights scratch_;
};

void Stage::plan(Size in, Size out, Filter filter, Rect wanted) {
  horizontal_.plan(in.width, out.width, filter, wanted.columns);
  first_output_ = wanted.rows.first;
  bytes_ = wanted.columns.count * kChannels;
  stride_ = bytes_ + kRowPadding;

  windows_.clear();
  weights_.clear();
  ring_rows_ = most_weights(in.height, out.height, filter);
  for (int64_t y = first_output_; y < first_output_ + wanted.rows.count; ++y) {
    windows_.push_back(weigh(y, in.height, out.height, filter, scratch_));
    scratch_.fixed.resize(static_cast<size_t>(ring_rows_));
    weights_.insert(weights_.end(), scratch_.fixed.begin(), scratch_.fixed.end());
  }
  inputs_ = windows_.front();
  for (const Range& window : windows_) inputs_ = join(inputs_, window);

  next_input_ = inputs_.first;
  ring_.resize(static_cast<size_t>(ring_rows_ * stride_));
  out_.resize(static_cast<size_t>(stride_));
  taps_.resize(static_cast<size_t>(ring_rows_));
}

const uint8_t* Stage::row(int64_t y) {
  const int64_t output = y - first_output_;
  const Range window = windows_[static_cast<size_t>(output)];
  const int32_t* weights = weights_.data() + output * ring_rows_;
  for (; next_input_ < window.first + window.count; ++next_input_) {
    horizontal_.run(source_->row(next_input_), ring_row(next_input_));
  }
  if (window.count == 1) return ring_row(window.first);
  for (int64_t t = 0; t < window.count; ++t) taps_[static_cast<size_t>(t)] = ring_row(window.first + t);
  if (is_average(weights, window.count)) {
    row_kernels().average_rows(taps_[0], taps_[1], bytes_, out_.data());
  } else {
    row_kernels().weigh_rows(taps_.data(), weights, static_cast<int32_t>(window.count), bytes_, out_.data());
  }
  return out_.data();
}

// ---------------------------------------------------------------------------------------------------
// Pipelines
// ---------------------------------------------------------------------------------------------------

/// Several resizes in sequence, then a crop. Each thread keeps one, so planning reuses its memory.
class Pipeline {
 public:
  void open(const ImageView& picture) {
    picture_ = picture;
    steps_.clear();
  }
  Size size() const { return steps_.empty() ? Size{picture_.width, picture_.height} : steps_.back().out; }
  void resize(Size size, Filter filter);
  /// Writes the central `size` of the last resize; an odd remainder is cut from the right and the bottom.
  void crop(Size size, uint8_t* out);

 private:
  struct Step {
    Size in, out;
    Filter filter;
  };

  ImageView picture_{};
  std::vector<Step> steps_;
  std::vector<Stage> stages_;
  PictureRows reader_;
};

void Pipeline::resize(Size out, Filter filter) {
  Size in = size();
  // Like Pillow, resize very tall images in the other order, vertical pass first.
  if (in.height > in.width * 100 && out.height < in.height) {
    steps_.push_back({in, {in.width, out.height}, filter});
    in = size();
  }
  if (in != out) steps_.push_back({in, out, filter});
}

void Pipeline::crop(Size target, uint8_t* out) {
  const Size whole = size();
  const Rect rect = {{(whole.width - target.width) / 2, target.width},
                     {(whole.height - target.height) / 2, target.height}};
  if (stages_.size() < steps_.size()) stages_.resize(steps_.size());

  // Each stage tells the previous one which part of its output is needed.
  Rect wanted = rect;
  for (size_t i = steps_.size(); i-- > 0;) {
    stages_[i].plan(steps_[i].in, steps_[i].out, steps_[i].filter, wanted);
    wanted = stages_[i].inputs();
  }
  reader_.open(picture_, wanted.columns);
  Rows* last = &reader_;
  for (size_t i = 0; i < steps_.size(); ++i) {
    stages_[i].read_from(*last);
    last = &stages_[i];
  }

  const auto bytes = static_cast<size_t>(target.width * kChannels);
  for (int64_t y = 0; y < target.height; ++y, out += bytes) std::memcpy(out, last->row(rect.rows.first + y), bytes);
}

std::string to_string(Size size) { return std::to_string(size.width) + "x" + std::to_string(size.height); }

/// This thread's pipeline, prepared for an image.
Pipeline& open_pipeline(const ImageView& in, Size target) {
  const auto check = [](const char* what, Size size) {
    if (size.width > 0 && size.height > 0) return;
    throw Error(ErrorCode::BadInput, what, "a width and a height of at least 1", to_string(size));
  };
  check("picture", {in.width, in.height});
  check("size to resize to", target);
  thread_local Pipeline pipeline;
  pipeline.open(in);
  return pipeline;
}

}  // namespace

void resize(const ImageView& in, uint8_t* out, int width, int height, Filter filter) {
  const Size target = {width, height};
  Pipeline& pipeline = open_pipeline(in, target);
  pipeline.resize(target, filter);
  pipeline.crop(target, out);
}

void center_crop(const ImageView& in, uint8_t* out, int width, int height) {
  const Size target = {width, height};
  Pipeline& pipeline = open_pipeline(in, target);
  Size size = pipeline.size();
  while (size.width >= 2 * target.width && size.height >= 2 * target.height) {
    size = {size.width / 2, size.height / 2};
    pipeline.resize(size, Filter::Box);
  }
  const auto ratio = [](int64_t a, int64_t b) { return static_cast<double>(a) / static_cast<double>(b); };
  const double scale = std::max(ratio(target.width, size.width), ratio(target.height, size.height));
  // Like Python's round(), nearbyint rounds halves to even.
  const auto scaled = [=](int64_t x) { return static_cast<int64_t>(std::nearbyint(static_cast<double>(x) * scale)); };
  pipeline.resize({scaled(size.width), scaled(size.height)}, Filter::Bicubic);
  pipeline.crop(target, out);
}

void shortest_edge_crop(const ImageView& in, uint8_t* out, int width, int height, int edge, Filter filter) {
  const Size target = {width, height};
  Pipeline& pipeline = open_pipeline(in, target);
  if (edge < std::max(width, height)) {
    throw Error(ErrorCode::BadInput, "shortest edge to resize to", "at least the crop's " + to_string(target),
                std::to_string(edge));
  }
  const int64_t shortest = std::min(in.width, in.height);
  pipeline.resize({int64_t{edge} * in.width / shortest, int64_t{edge} * in.height / shortest}, filter);
  pipeline.crop(target, out);
}

void resample(const ImageView& in, uint8_t* out, const Resampling& to) {
  switch (to.mode) {
    case Resampling::Mode::Cover: return center_crop(in, out, to.width, to.height);
    case Resampling::Mode::ShortestEdge: return shortest_edge_crop(in, out, to.width, to.height, to.edge, to.filter);
    case Resampling::Mode::Stretch: return resize(in, out, to.width, to.height, to.filter);
  }
}

}  // namespace uniflow
