/// Resizing of decoded 8-bit RGB pictures, bit for bit as Pillow (9 and later) does it.
///
/// Published vision models were trained on pictures that Pillow resized, so its arithmetic is the
/// specification: antialiased separable filters, weights in 22-bit fixed point, the horizontal pass
/// first, and 8-bit pixels between the two passes. A crop of a resized picture costs only the pixels
/// inside the crop, and the intermediate pictures are never stored: rows flow through a few kilobytes
/// of scratch that each thread keeps.
///
/// One call runs on one thread; calls on several threads at once are safe. All functions write a packed
/// picture [height, width, 3] and throw Error (BadInput) where a size makes no sense.
#pragma once

#include <cstddef>
#include <cstdint>

namespace uniflow {

enum class Filter : uint8_t { Box, Bilinear, Bicubic, Lanczos };

/// An RGB picture that someone else owns.
struct ImageView {
  const uint8_t* data;
  int width, height;
  size_t stride;  // bytes from one row to the next, at least 3 * width

  static ImageView packed(const uint8_t* data, int width, int height) {
    return {data, width, height, size_t{3} * static_cast<size_t>(width)};
  }
};

/// The whole picture at another size: `Image.resize((width, height), filter)`.
void resize(const ImageView& in, uint8_t* out, int width, int height, Filter filter);

/// What ADM, DiT and UniFlow do (`center_crop_arr`): halve by BOX while the picture is at least twice as
/// large as the target, scale by BICUBIC until it just covers the target, and cut out the center.
/// The published function knows square targets only; for those this is the same.
void center_crop(const ImageView& in, uint8_t* out, int width, int height);

/// What Hugging Face's CLIP-style processors do: resize so that the shortest edge is `edge` pixels, the
/// longest in proportion (rounded down), and cut out the center. The target must fit, so `edge` is at
/// least max(width, height).
void shortest_edge_crop(const ImageView& in, uint8_t* out, int width, int height, int edge, Filter filter);

/// A resize to do.
struct Resampling {
  int width, height;
  enum class Mode : uint8_t { Cover, ShortestEdge, Stretch } mode;
  int edge;       // of ShortestEdge
  Filter filter;  // of the two others; Cover has its own
};

/// center_crop, shortest_edge_crop or resize.
void resample(const ImageView& in, uint8_t* out, const Resampling& to);

}  // namespace uniflow
