/// Decodes JPEG files to packed RGB with libjpeg-turbo; the bytes equal sharp's.
///
/// This is the fast path for nearly all JPEG files: 8-bit grey, YCbCr or RGB, complete and undamaged. It declines everything else (CMYK,
/// and any damage, even if decodable), and leaves it to a decoder that reports more details.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "native/core/file.h"
#include "native/core/command.h"
#include "native/image/resample.h"

namespace uniflow {

/// A JPEG file with its header parsed.
struct Jpeg {
  std::span<const uint8_t> file;
  int width, height;  // of the upright image, in pixels
  int orientation;    // EXIF orientation, 1 to 8
};

/// Reads the file at `path` if it begins like a JPEG.
std::optional<Bytes> read_jpeg_file(const std::string& path);

/// Parses the file up to the first scan. Null if it is not a supported kind of JPEG.
std::optional<Jpeg> read_jpeg_header(std::span<const uint8_t> file);

/// Decodes to `out`, [height, width, 3], upright. Returns false, with undefined content in `out`, if the file is damaged. Throws Error
/// (Aborted).
bool decode_jpeg(const Jpeg& jpeg, uint8_t* out, const CancelToken& token);

/// The same, resized to `out`, [to.height, to.width, 3].
bool decode_jpeg(const Jpeg& jpeg, const Resampling& to, uint8_t* out, const CancelToken& token);

}  // namespace uniflow
