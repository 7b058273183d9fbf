/// Resizes decoded 8-bit RGB images, bit-identical to Pillow (9 and later).
///
/// Published vision models were trained on images resized by Pillow, so its arithmetic is the specification: antialiased separable filters,
/// weights in 22-bit fixed point, the horizontal pass first, and 8-bit pixels between the two passes. Cropping a resized image computes
/// only the pixels inside the crop. Intermediate images are never stored: rows flow through a few kilobytes of per-thread scratch.
///
/// A call runs on one thread; concurrent calls are safe. All functions write a packed image [height, width, 3] and throw Error (BadInput)
/// for an invalid size.
#pragma once

#include <cstddef>
#include <cstdint>

namespace uniflow {

enum class Filter : uint8_t { Box, Bilinear, Bicubic, Lanczos };

/// A view of an RGB image owned by the caller.
struct ImageView {
  const uint8_t* data;
  int width, height;
  size_t stride;  // bytes from one row to the next, at least 3 * width

  static ImageView packed(const uint8_t* data, int width, int height) {
    return {data, width, height, size_t{3} * static_cast<size_t>(width)};
  }
};

/// The whole image at another size: `Image.resize((width, height), filter)`.
void resize(const ImageView& in, uint8_t* out, int width, int height, Filter filter);

/// The crop of ADM, DiT and UniFlow (`center_crop_arr`): halve with BOX while the image is at least twice as large as the target, scale
/// with BICUBIC until it just covers the target, and cut out the center. The published function supports only square targets; for those the
/// result is the same.
void center_crop(const ImageView& in, uint8_t* out, int width, int height);

/// The crop of Hugging Face's CLIP-style processors: resize so that the shortest edge is `edge` pixels and the longest is in proportion
/// (rounded down), and cut out the center. The target must fit, so `edge` is at least max(width, height).
void shortest_edge_crop(const ImageView& in, uint8_t* out, int width, int height, int edge, Filter filter);

/// A resize operation and its parameters.
struct Resampling {
  int width, height;
  enum class Mode : uint8_t { Cover, ShortestEdge, Stretch } mode;
  int edge;       // ShortestEdge only
  Filter filter;  // not for Cover, which has its own
};

/// Calls center_crop, shortest_edge_crop or resize.
void resample(const ImageView& in, uint8_t* out, const Resampling& to);

}  // namespace uniflow
