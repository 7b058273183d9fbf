/// Pixels to tokens. p is the patch size, N = floor(H/p)*floor(W/p), P = 3*p*p; patch vectors are ordered (channel, row, column). Pixels to
/// the right of and below the last whole patch are dropped, as in a convolution of stride p.
#pragma once

#include <array>

#include "native/ops/linear.h"

namespace uniflow::ops {

/// Per-channel mean and standard deviation of pixels scaled to [0, 1].
struct Normalisation {
  std::array<float, 3> mean, std;
};

/// Pixels -> patch vectors [B, N, P] of `dtype`. pixels: uint8 [B, H, W, 3], which are normalised, or float32 [B, 3, H, W], already
/// normalised.
Tensor unfold(const SessionRef& session, const Tensor& pixels, int64_t patch, const Normalisation& normalisation, DType dtype);

/// Patch vectors [B, rows*cols, P] float32 -> pixels, the inverse of unfold: uint8 [B, H, W, 3] (denormalised, rounded, clamped)
/// or float32 [B, 3, H, W].
Tensor fold(const SessionRef& session, const Tensor& patches, int64_t rows, int64_t cols, int64_t patch, const Normalisation& normalisation,
            DType pixel_dtype);

/// Patch embedding: unfold, linear, assemble -> [B, T+N, D].
Tensor patch_embed(const SessionRef& session, const Tensor& pixels, const Tensor& weight, const Tensor& bias, const Tensor& prefix,
                   const Tensor& position, int64_t patch, const Normalisation& normalisation, DType dtype);

/// Adds the position table [N, D] to the tokens of x [B, N, D] and puts the prefix tokens [T, D] in front (either may be empty) -> [B, T+N,
/// D].
Tensor assemble(const SessionRef& session, const Tensor& x, const Tensor& prefix, const Tensor& position);

/// Bicubic resize of a position table [R*C, D] float32, as PyTorch's interpolate(mode="bicubic", align_corners=False, antialias).
Tensor resize_table(const SessionRef& session, const Tensor& table, int64_t rows, int64_t cols, int64_t out_rows, int64_t out_cols,
                    bool antialias);

/// Gradient of resize_table: [out_rows*out_cols, D] -> [rows*cols, D].
Tensor resize_table_backward(const SessionRef& session, const Tensor& d_out, int64_t rows, int64_t cols, int64_t out_rows, int64_t out_cols,
                             bool antialias);

}  // namespace uniflow::ops
