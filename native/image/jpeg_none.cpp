/// Replaces jpeg.cpp if libjpeg-turbo is not available: declines every file, so sharp decodes it.
#include "native/image/jpeg.h"

namespace uniflow {

std::optional<Bytes> read_jpeg_file(const std::string&) { return std::nullopt; }

std::optional<Jpeg> read_jpeg_header(std::span<const uint8_t>) { return std::nullopt; }

bool decode_jpeg(const Jpeg&, uint8_t*, const CancelToken&) { return false; }

bool decode_jpeg(const Jpeg&, const Resampling&, uint8_t*, const CancelToken&) { return false; }

}  // namespace uniflow
