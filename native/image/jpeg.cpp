#include "native/image/jpeg.h"

#include <cstdio>  // required by jpeglib.h

#include <jpeglib.h>

#include <algorithm>
#include <csetjmp>
#include <cstring>
#include <iterator>
#include <memory>
#include <utility>

#ifndef LIBJPEG_TURBO_VERSION
#error "libjpeg-turbo is needed: other libraries of this interface give other pixels"
#endif

namespace uniflow {
namespace {

constexpr int kChannels = 3;
constexpr uint8_t kStart[] = {0xFF, 0xD8};
constexpr size_t kMostBytes = (size_t{1} << 31) - 1;  // largest file
/// A small file can demand thousands of passes over a large image; real ones have about ten.
constexpr int kMostScans = 100;

// ---------------------------------------------------------------------------------------------------
// libjpeg's errors: all of them, including warnings, exit by longjmp
// ---------------------------------------------------------------------------------------------------

struct Escape : jpeg_error_mgr {
  std::jmp_buf to;
};

[[noreturn]] void leave(j_common_ptr jpeg) { std::longjmp(static_cast<Escape*>(jpeg->err)->to, 1); }

void leave_on_warning(j_common_ptr jpeg, int level) {
  if (level < 0) leave(jpeg);
}

struct Progress : jpeg_progress_mgr {
  const CancelToken* token;
};

/// Called every few rows: stops on cancellation and on too many scans.
void look_around(j_common_ptr jpeg) {
  const CancelToken* token = static_cast<Progress*>(jpeg->progress)->token;
  if (token && token->cancelled()) leave(jpeg);
  if (reinterpret_cast<j_decompress_ptr>(jpeg)->input_scan_number > kMostScans) leave(jpeg);
}

/// Calls `work(decompressor)` after reading the file's header; returns false if libjpeg found a fault. `work` must own nothing, because
/// longjmp runs no destructors.
template <class Work>
bool with_header(std::span<const uint8_t> file, const CancelToken* token, Work work) {
  Escape escape;
  Progress progress{};
  jpeg_decompress_struct jpeg{};
  jpeg.err = jpeg_std_error(&escape);
  escape.error_exit = leave;
  escape.emit_message = leave_on_warning;
  progress.progress_monitor = look_around;
  progress.token = token;
  bool fine = false;
  if (setjmp(escape.to) == 0) {
    jpeg_create_decompress(&jpeg);
    jpeg.progress = &progress;
    jpeg_mem_src(&jpeg, file.data(), file.size());
    jpeg_read_header(&jpeg, TRUE);
    fine = work(jpeg);
  } else {
    fine = false;
  }
  jpeg_destroy_decompress(&jpeg);
  return fine;
}

bool is_plain(const jpeg_decompress_struct& jpeg) {
  const J_COLOR_SPACE space = jpeg.jpeg_color_space;
  const bool grey = jpeg.num_components == 1 && space == JCS_GRAYSCALE;
  const bool color = jpeg.num_components == 3 && (space == JCS_YCbCr || space == JCS_RGB);
  return jpeg.data_precision == 8 && !jpeg.arith_code && (grey || color);
}

// ---------------------------------------------------------------------------------------------------
// Orientation: EXIF 2.32, 4.6.4 and 4.6.5
// ---------------------------------------------------------------------------------------------------

/// A TIFF structure in either byte order.
class Tiff {
 public:
  explicit Tiff(std::span<const uint8_t> bytes) : bytes_(bytes) {}

  bool valid() const { return bytes_.size() >= 8 && (starts_with("II*\0") || starts_with("MM\0*")); }
  bool has(size_t offset, size_t count) const { return offset <= bytes_.size() && count <= bytes_.size() - offset; }
  uint32_t u16(size_t at) const { return big() ? bytes_[at] << 8 | bytes_[at + 1] : bytes_[at + 1] << 8 | bytes_[at]; }
  uint32_t u32(size_t at) const { return big() ? u16(at) << 16 | u16(at + 2) : u16(at + 2) << 16 | u16(at); }

 private:
  bool starts_with(const char (&text)[5]) const { return std::memcmp(bytes_.data(), text, 4) == 0; }
  bool big() const { return bytes_[0] == 'M'; }

  std::span<const uint8_t> bytes_;
};

/// 1 to 8; 1 if unspecified, 0 if ambiguous.
int orientation_in(Tiff tiff) {
  constexpr uint32_t kOrientation = 0x0112, kShort = 3;
  constexpr size_t kEntry = 12;
  if (!tiff.valid()) return 0;
  const size_t directory = tiff.u32(4);
  if (!tiff.has(directory, 2)) return 0;
  const size_t entries = tiff.u16(directory);
  if (!tiff.has(directory + 2, entries * kEntry)) return 0;
  int orientation = 1;
  bool found = false;
  for (size_t i = 0; i < entries; ++i) {
    const size_t entry = directory + 2 + i * kEntry;
    if (tiff.u16(entry) != kOrientation) continue;
    const uint32_t value = tiff.u16(entry + 8);
    const bool clear = tiff.u16(entry + 2) == kShort && tiff.u32(entry + 4) == 1 && value >= 1 && value <= 8;
    if (!clear || found) return 0;
    found = true;
    orientation = static_cast<int>(value);
  }
  return orientation;
}

/// The orientation in the segments before the first scan. libjpeg could collect these segments, but in time quadratic in their number.
int orientation_of(std::span<const uint8_t> file) {
  constexpr uint8_t kFill = 0xFF, kApp1 = 0xE1, kScan = 0xDA, kExif[] = {'E', 'x', 'i', 'f', 0, 0};
  constexpr size_t kName = 4;  // compared bytes of the six
  const auto stands_alone = [](uint8_t marker) { return marker <= 0x01 || (marker >= 0xD0 && marker <= 0xD9); };
  int orientation = 1;
  bool found = false;
  for (size_t at = sizeof kStart; at + 4 <= file.size();) {
    const uint8_t marker = file[at + 1];
    if (file[at] != kFill || stands_alone(marker)) return 0;
    if (marker == kScan) return orientation;
    if (marker == kFill) {
      ++at;
      continue;
    }
    const size_t length = static_cast<size_t>(file[at + 2]) << 8 | file[at + 3];
    if (length < 2 || length > file.size() - at - 2) return 0;
    const auto data = file.subspan(at + 4, length - 2);
    at += 2 + length;
    if (marker != kApp1 || data.size() < kName || std::memcmp(data.data(), kExif, kName) != 0) continue;
    if (found || data.size() < sizeof kExif || std::memcmp(data.data(), kExif, sizeof kExif) != 0) return 0;
    found = true;
    orientation = orientation_in(Tiff(data.subspan(sizeof kExif)));
    if (orientation == 0) return 0;
  }
  return 0;
}

bool is_sideways(int orientation) { return orientation >= 5; }

/// Maps pixels of the stored image to the upright one, as offsets in pixels.
struct Turn {
  int64_t first, right, down;  // offset of the first pixel; steps for one pixel to the right, and one down, in the file

  Turn(int orientation, int64_t w, int64_t h) {
    const bool sideways = is_sideways(orientation);
    const int64_t row = sideways ? h : w;  // row length of the upright image
    const bool from_right = orientation == 2 || orientation == 3 || orientation == 6 || orientation == 7;
    const bool from_bottom = orientation == 3 || orientation == 4 || orientation == 7 || orientation == 8;
    const int64_t across = from_right ? -1 : 1, along = from_bottom ? -row : row;
    first = (from_right ? row - 1 : 0) + (from_bottom ? (w * h - row) : 0);
    right = sideways ? along : across;
    down = sideways ? across : along;
  }
};

// ---------------------------------------------------------------------------------------------------
// Pixels
// ---------------------------------------------------------------------------------------------------

void read_upright(jpeg_decompress_struct& jpeg, uint8_t* out) {
  const size_t row = size_t{kChannels} * jpeg.output_width;
  while (jpeg.output_scanline < jpeg.output_height) {
    JSAMPROW rows[4];  // as many as libjpeg delivers at once
    for (size_t i = 0; i < std::size(rows); ++i)
      rows[i] = out + row * std::min(jpeg.output_scanline + i, size_t{jpeg.output_height} - 1);
    jpeg_read_scanlines(&jpeg, rows, std::min<JDIMENSION>(std::size(rows), jpeg.output_height - jpeg.output_scanline));
  }
}

void read_turned(jpeg_decompress_struct& jpeg, const Turn& turn, uint8_t* out) {
  auto* common = reinterpret_cast<j_common_ptr>(&jpeg);
  JSAMPARRAY row = jpeg.mem->alloc_sarray(common, JPOOL_IMAGE, kChannels * jpeg.output_width, 1);
  while (jpeg.output_scanline < jpeg.output_height) {
    const int64_t first = turn.first + turn.down * jpeg.output_scanline;
    jpeg_read_scanlines(&jpeg, row, 1);
    for (int64_t x = 0; x < jpeg.output_width; ++x)
      std::memcpy(out + kChannels * (first + turn.right * x), row[0] + kChannels * x, kChannels);
  }
}

/// Whether a progressive file's scans contain all coefficients. Otherwise libjpeg smooths the image, and each version does so differently.
bool is_complete(const jpeg_decompress_struct& jpeg) {
  if (!jpeg.coef_bits) return true;
  const auto* bits = &jpeg.coef_bits[0][0];
  return std::all_of(bits, bits + jpeg.num_components * DCTSIZE2, [](int b) { return b == 0; });
}

size_t rgb_bytes(int width, int height) { return size_t{kChannels} * static_cast<size_t>(width) * static_cast<size_t>(height); }

}  // namespace

std::optional<Bytes> read_jpeg_file(const std::string& path) { return read_file(path, kStart, kMostBytes); }

std::optional<Jpeg> read_jpeg_header(std::span<const uint8_t> file) {
  Jpeg found{file, 0, 0, orientation_of(file)};
  if (found.orientation == 0) return std::nullopt;
  const bool plain = with_header(file, nullptr, [&](jpeg_decompress_struct& jpeg) {
    found.width = static_cast<int>(jpeg.image_width);
    found.height = static_cast<int>(jpeg.image_height);
    return is_plain(jpeg);
  });
  if (!plain) return std::nullopt;
  if (is_sideways(found.orientation)) std::swap(found.width, found.height);
  return found;
}

bool decode_jpeg(const Jpeg& expected, uint8_t* out, const CancelToken& token) {
  const int orientation = expected.orientation;
  const auto [width, height] = is_sideways(orientation) ? std::pair(expected.height, expected.width) : std::pair(expected.width, expected.height);
  const bool whole = with_header(expected.file, &token, [=](jpeg_decompress_struct& jpeg) {
    const bool same = static_cast<int>(jpeg.image_width) == width && static_cast<int>(jpeg.image_height) == height;
    if (!same || !is_plain(jpeg)) return false;  // the bytes were changed after the header was read
    jpeg.out_color_space = JCS_RGB;
    jpeg_start_decompress(&jpeg);
    if (!is_complete(jpeg)) return false;
    if (orientation == 1) read_upright(jpeg, out);
    else read_turned(jpeg, Turn(orientation, width, height), out);
    jpeg_finish_decompress(&jpeg);
    return true;
  });
  token.throw_if_cancelled();
  return whole;
}

bool decode_jpeg(const Jpeg& jpeg, const Resampling& to, uint8_t* out, const CancelToken& token) {
  const auto picture = std::make_unique_for_overwrite<uint8_t[]>(rgb_bytes(jpeg.width, jpeg.height));
  if (!decode_jpeg(jpeg, picture.get(), token)) return false;
  resample(ImageView::packed(picture.get(), jpeg.width, jpeg.height), out, to);
  return true;
}

}  // namespace uniflow
