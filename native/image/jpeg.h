/// JPEG files to packed RGB by libjpeg-turbo, with the bytes that Pillow and sharp give.
///
/// This is the quick way for what nearly all JPEG files are: 8-bit grey, YCbCr or RGB, whole and without a flaw. Everything else (CMYK, damage of
/// any kind, even where it could be decoded around) is declined, and left to a decoder that can say more about it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>

namespace uniflow {

/// The size of the picture in pixels, upright.
struct JpegSize {
  int width, height;
};

/// Reads as far as the first scan. Null: not a JPEG of the plain kinds.
std::optional<JpegSize> read_jpeg_size(std::span<const uint8_t> file);

/// A file in memory, and the size of its picture.
struct JpegFile {
  std::unique_ptr<uint8_t[]> data;
  size_t bytes;
  JpegSize size;

  std::span<const uint8_t> span() const { return {data.get(), bytes}; }
};

/// Null as well where the file cannot be read. Of files that do not begin as a JPEG, no more than that is read.
std::optional<JpegFile> open_jpeg(const std::string& path);

/// Decodes to `out`, [height, width, 3], turned upright by the EXIF orientation. Throws Error (BadInput) where the file is damaged, or not of this
/// size.
void decode_jpeg(std::span<const uint8_t> file, JpegSize size, uint8_t* out);

}  // namespace uniflow
