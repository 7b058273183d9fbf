#include "native/image/jpeg.h"

#include <cstdio>  // jpeglib.h needs it

#include <fcntl.h>
#include <jpeglib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csetjmp>
#include <cstring>
#include <iterator>
#include <string>
#include <string_view>

#include "native/core/error.h"

#ifndef LIBJPEG_TURBO_VERSION
#error "libjpeg-turbo is needed: other libraries of this interface give other pixels"
#endif

namespace uniflow {
namespace {

constexpr int kExifMarker = JPEG_APP0 + 1;
/// A small file can ask for thousands of passes over a large picture; true ones have about ten.
constexpr int kMostScans = 100;

// ---------------------------------------------------------------------------------------------------
// libjpeg's errors: all of them, warnings included, leave by longjmp
// ---------------------------------------------------------------------------------------------------

struct Escape : jpeg_error_mgr {
  std::jmp_buf to;
};

[[noreturn]] void leave(j_common_ptr jpeg) { std::longjmp(static_cast<Escape*>(jpeg->err)->to, 1); }

void leave_on_warning(j_common_ptr jpeg, int level) {
  if (level < 0) leave(jpeg);
}

void leave_on_many_scans(j_common_ptr jpeg) {
  if (reinterpret_cast<j_decompress_ptr>(jpeg)->input_scan_number > kMostScans) leave(jpeg);
}

/// Calls `work(decompressor)` with the file's header read; false where libjpeg found fault. `work` must own nothing: longjmp destroys nothing.
template <class Work>
bool with_header(std::span<const uint8_t> file, Work work) {
  Escape escape;
  jpeg_progress_mgr progress{};
  jpeg_decompress_struct jpeg{};
  jpeg.err = jpeg_std_error(&escape);
  escape.error_exit = leave;
  escape.emit_message = leave_on_warning;
  progress.progress_monitor = leave_on_many_scans;
  bool fine = false;
  if (setjmp(escape.to) == 0) {
    jpeg_create_decompress(&jpeg);
    jpeg.progress = &progress;
    jpeg_save_markers(&jpeg, kExifMarker, 0xFFFF);
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

/// A TIFF structure, of either byte order.
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

/// 1 to 8; 1 where nothing is said, 0 where it is not clear what.
int orientation_in(Tiff tiff) {
  constexpr uint32_t kOrientation = 0x0112, kShort = 3;
  constexpr size_t kEntry = 12;
  if (!tiff.valid()) return 0;
  const size_t directory = tiff.u32(4);
  if (!tiff.has(directory, 2)) return 0;
  const size_t entries = tiff.u16(directory);
  if (!tiff.has(directory + 2, entries * kEntry)) return 0;
  int orientation = 1;
  for (size_t i = 0; i < entries; ++i) {
    const size_t entry = directory + 2 + i * kEntry;
    if (tiff.u16(entry) != kOrientation) continue;
    const uint32_t value = tiff.u16(entry + 8);
    const bool clear = tiff.u16(entry + 2) == kShort && tiff.u32(entry + 4) == 1 && value >= 1 && value <= 8;
    if (!clear || orientation != 1) return 0;
    orientation = static_cast<int>(value);
  }
  return orientation;
}

int orientation_of(const jpeg_decompress_struct& jpeg) {
  constexpr std::string_view kExif("Exif\0\0", 6);
  int orientation = 1;
  bool seen = false;
  for (auto* marker = jpeg.marker_list; marker; marker = marker->next) {
    const std::span<const uint8_t> data(marker->data, marker->data_length);
    if (data.size() < kExif.size() || std::memcmp(data.data(), kExif.data(), 4) != 0) continue;  // XMP
    if (seen || data[4] != 0) return 0;
    seen = true;
    orientation = orientation_in(Tiff(data.subspan(kExif.size())));
  }
  return orientation;
}

/// Where the pixels of a picture come to lie in the upright one, in pixels.
struct Turn {
  int64_t first, right, down;  // the first pixel; one further to the right, one further down in the file

  Turn(int orientation, int64_t w, int64_t h) {
    const bool sideways = orientation >= 5;
    const int64_t row = sideways ? h : w;  // of the upright picture
    const bool from_right = orientation == 2 || orientation == 3 || orientation == 6 || orientation == 7;
    const bool from_bottom = orientation == 3 || orientation == 4 || orientation == 7 || orientation == 8;
    const int64_t across = from_right ? -1 : 1, along = from_bottom ? -row : row;
    first = (from_right ? row - 1 : 0) + (from_bottom ? (w * h - row) : 0);
    right = sideways ? along : across;
    down = sideways ? across : along;
  }
};

std::string to_string(JpegSize size) { return std::to_string(size.width) + " x " + std::to_string(size.height); }

JpegSize upright(const jpeg_decompress_struct& jpeg, int orientation) {
  const int width = static_cast<int>(jpeg.image_width), height = static_cast<int>(jpeg.image_height);
  return orientation >= 5 ? JpegSize{height, width} : JpegSize{width, height};
}

// ---------------------------------------------------------------------------------------------------
// Pixels
// ---------------------------------------------------------------------------------------------------

constexpr int kChannels = 3;

void read_upright(jpeg_decompress_struct& jpeg, uint8_t* out) {
  const size_t row = size_t{kChannels} * jpeg.output_width;
  while (jpeg.output_scanline < jpeg.output_height) {
    JSAMPROW rows[4];  // as many as libjpeg has at hand at once
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

// ---------------------------------------------------------------------------------------------------
// Files
// ---------------------------------------------------------------------------------------------------

/// Closed when it goes.
class Descriptor {
 public:
  explicit Descriptor(const std::string& path) : fd_(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {}  // a pipe must not make us wait
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;

  /// Of a regular file; 0 where it is none.
  size_t bytes() const {
    struct stat info;
    return fd_ >= 0 && fstat(fd_, &info) == 0 && S_ISREG(info.st_mode) ? static_cast<size_t>(info.st_size) : 0;
  }

  bool read_all(uint8_t* to, size_t bytes) const {
    for (ssize_t n; bytes > 0; to += n, bytes -= static_cast<size_t>(n)) {
      do n = read(fd_, to, bytes);
      while (n < 0 && errno == EINTR);
      if (n <= 0) return false;
    }
    return true;
  }

 private:
  int fd_;
};

}  // namespace

std::optional<JpegFile> open_jpeg(const std::string& path) {
  constexpr uint8_t kStart[] = {0xFF, 0xD8};
  const Descriptor file(path);
  const size_t bytes = file.bytes();
  uint8_t start[sizeof kStart];
  if (bytes <= sizeof start || !file.read_all(start, sizeof start) || std::memcmp(start, kStart, sizeof start) != 0) return std::nullopt;
  JpegFile jpeg{std::make_unique_for_overwrite<uint8_t[]>(bytes), bytes, {}};
  std::memcpy(jpeg.data.get(), start, sizeof start);
  if (!file.read_all(jpeg.data.get() + sizeof start, bytes - sizeof start)) return std::nullopt;
  const auto size = read_jpeg_size(jpeg.span());
  if (!size) return std::nullopt;
  jpeg.size = *size;
  return jpeg;
}

std::optional<JpegSize> read_jpeg_size(std::span<const uint8_t> file) {
  JpegSize size{};
  const bool plain = with_header(file, [&](jpeg_decompress_struct& jpeg) {
    const int orientation = orientation_of(jpeg);
    size = upright(jpeg, orientation);
    return orientation != 0 && is_plain(jpeg);
  });
  if (!plain) return std::nullopt;
  return size;
}

void decode_jpeg(std::span<const uint8_t> file, JpegSize size, uint8_t* out) {
  const bool whole = with_header(file, [=](jpeg_decompress_struct& jpeg) {
    const int orientation = orientation_of(jpeg);
    const JpegSize found = upright(jpeg, orientation);
    if (orientation == 0 || !is_plain(jpeg) || found.width != size.width || found.height != size.height) return false;
    jpeg.out_color_space = JCS_RGB;
    jpeg_start_decompress(&jpeg);
    if (orientation == 1) read_upright(jpeg, out);
    else read_turned(jpeg, Turn(orientation, jpeg.output_width, jpeg.output_height), out);
    jpeg_finish_decompress(&jpeg);
    return true;
  });
  if (!whole) throw Error(ErrorCode::BadInput, "file", "a JPEG without a flaw, " + to_string(size), "another");
}

}  // namespace uniflow
