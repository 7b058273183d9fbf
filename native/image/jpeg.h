/// JPEG files to packed RGB by libjpeg-turbo, with the bytes that sharp gives.
///
/// This is the quick way for what nearly all JPEG files are: 8-bit grey, YCbCr or RGB, whole and without a flaw. Everything else (CMYK, damage of
/// any kind, even where it could be decoded around) is declined, and left to a decoder that can say more about it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "native/core/file.h"
#include "native/core/stream.h"
#include "native/image/resample.h"

namespace uniflow {

/// A file whose header was read.
struct Jpeg {
  std::span<const uint8_t> file;
  int width, height;  // upright, in pixels
  int orientation;    // 1 to 8, as EXIF says
};

/// The file at `path`, if it begins as a JPEG.
std::optional<Bytes> read_jpeg_file(const std::string& path);

/// Reads as far as the first scan. Null: not a JPEG of the plain kinds.
std::optional<Jpeg> read_jpeg_header(std::span<const uint8_t> file);

/// Decodes to `out`, [height, width, 3], upright. False, with arbitrary content of `out`: the file is damaged. Throws Error (Aborted).
bool decode_jpeg(const Jpeg& jpeg, uint8_t* out, const CancelToken& token);

/// The same, resized to `out`, [to.height, to.width, 3].
bool decode_jpeg(const Jpeg& jpeg, const Resampling& to, uint8_t* out, const CancelToken& token);

}  // namespace uniflow
