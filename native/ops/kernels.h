/// The kernel table: the functions that each backend provides (native/cpu, native/cuda).
///
/// A kernel takes sizes and raw pointers into the device's memory, already checked by native/ops. It runs on the device's stream, after all
/// work submitted before it. CPU kernels never throw; GPU kernels may (OutOfMemory, Unsupported, Internal). `dtype` is Float32 or BFloat16
/// unless noted otherwise; arithmetic is always float32. All float pointers named weight, bias or table are float32. Lists of pointers
/// (`const float* const*`) and fields marked "host" are in host memory on every device.
#pragma once

#include <cstdint>
#include <memory>

#include "native/core/activation.h"
#include "native/core/dtype.h"
#include "native/core/levels.h"
#include "native/core/rope.h"
#include "native/core/ssim.h"
#include "native/ops/kernel_list.h"

namespace uniflow {

class CancelToken;
class Tensor;
struct FlowHead;
struct Packing;
namespace ops {
struct FlowOptions;
}

/// out = residual + scale * act(x W^T + bias). FLOPs 2*rows*out*in.
struct LinearArgs {
  const void* x;           // [rows, in]
  const void* weight;      // [out, in], in the layout `packing`
  const Packing* packing;  // null: C order, in x_dtype
  void* out;               // [rows, out]
  int64_t rows, in, width;  // width: number of columns of out
  DType x_dtype, out_dtype;
  const float* bias = nullptr;      // [out]
  const float* scale = nullptr;     // [out]
  const void* residual = nullptr;   // [rows, out], in out_dtype; must not alias out
  Activation activation = Activation::None;
};

/// Gradients of out = x W^T + b. FLOPs 2*rows*out*in each.
struct LinearBackwardArgs {
  const void* x;       // [rows, in]
  const void* weight;  // [out, in] in C order
  const void* d_out;   // [rows, out]
  DType dtype;         // of x, weight, d_out, d_x
  int64_t rows, in, out;
  void* d_x = nullptr;        // [rows, in], or null
  float* d_weight = nullptr;  // [out, in], or null
  float* d_bias = nullptr;    // [out], or null
};

/// Multi-head self-attention, softmax(q k^T * scale) v, online softmax.
/// q, k, v are column blocks of one matrix: row = token, [B*S, 3*H*E] with q | k | v. FLOPs 4*B*H*S*S*E.
struct AttentionArgs {
  const void* qkv;  // [B, S, 3*H*E]
  void* out;        // [B, S, H*E]
  DType dtype;      // of both
  int64_t batch, seq, heads, head_dim;
  float scale;
  float* log_sum_exp = nullptr;  // [B, H, S] or null: log of the sum of exp(scale * q k) over the keys, for the backward pass
};

/// Backward pass of AttentionArgs; recomputes the scores block by block. FLOPs 10*B*H*S*S*E.
struct AttentionBackwardArgs {
  const void* qkv;           // [B, S, 3*H*E]
  const void* out;           // [B, S, H*E], from the forward pass
  const void* d_out;         // [B, S, H*E]
  const float* log_sum_exp;  // [B, H, S], from the forward pass
  void* d_qkv;               // [B, S, 3*H*E], overwritten
  DType dtype;               // of all but log_sum_exp
  int64_t batch, seq, heads, head_dim;
  float scale;
};

/// h' = h + gate * branch (if branch is given), then out = normalise(h') * weight + bias, then out * (1 + scale) + shift (if scale is
/// given). Bytes: each row read once, written once. A GPU keeps a row in registers, which limits it to 8192 columns, also in the backward
/// pass.
struct NormArgs {
  const void* x;  // [rows, width]
  void* out;      // [rows, width]; may be x
  DType x_dtype, out_dtype;
  int64_t rows, width;
  int64_t x_stride, out_stride;  // elements between rows
  bool rms;                      // x / rms(x) instead of (x - mean) / std
  float eps;
  const float* weight;  // [width] or null
  const float* bias;    // [width] or null
  // AdaLN, all in out_dtype, rows `modulation_stride` apart; null if absent
  const void* shift = nullptr;
  const void* scale = nullptr;
  int64_t modulation_stride = 0;
  // gated residual, written back to `residual` before normalising
  float* residual = nullptr;     // [rows, width] float32; if given, x is unused
  const void* branch = nullptr;  // [rows, width] of out_dtype
  const void* gate = nullptr;    // [rows, width] of out_dtype, rows gate_stride apart
  int64_t gate_stride = 0;
};

/// Pixels to patch vectors, channel slowest inside a patch: (c, row, column).
struct UnfoldArgs {
  const void* pixels;  // UInt8 [B, H, W, 3], to be normalised, or Float32 [B, 3, H, W], already normalised
  DType pixel_dtype;
  void* out;  // [B * floor(H/p) * floor(W/p), 3*p*p]
  DType dtype;
  int64_t batch, height, width, patch;
  float mean[3], std[3];
};

/// Patch vectors to pixels: the inverse of UnfoldArgs.
struct FoldArgs {
  const float* patches;  // [B*N, 3*p*p], rows [first, first + rows) of the batch
  void* pixels;          // UInt8 [B, H, W, 3], denormalised, rounded and clamped, or Float32 [B, 3, H, W]
  DType pixel_dtype;
  int64_t first, rows;
  int64_t height, width, patch;
  float mean[3], std[3];
};

/// [B*N, D] patches -> [B, P+N, D] tokens: prefix tokens in front, position table added to the patches.
struct AssembleArgs {
  const void* patches;
  void* out;
  DType dtype;
  int64_t batch, patch_count, prefix_count, width;
  const float* prefix;    // [P, D] or null
  const float* position;  // [N, D] or null
};

/// Bicubic resize of a position table, as PyTorch's interpolate with align_corners = false: [R0, C0, D] -> [R1, C1, D].
struct ResizeTableArgs {
  const float* in;
  float* out;
  int64_t in_rows, in_cols, out_rows, out_cols, width;
  bool antialias;
};

/// Rotary positions for q and k of [B, S, 3*H*E], from token `prefix` on; everything else is copied.
/// Pairs are (i, i + E/2). cosine and sine are [S - prefix, E].
struct RopeArgs {
  const void* qkv;
  void* out;
  DType dtype;
  int64_t batch, seq, heads, head_dim, prefix;
  const float* cosine;
  const float* sine;
  bool inverse = false;  // rotate backwards: the gradient
};

/// Standard normal numbers by Philox4x32-10 and Box-Muller. Row r of the output is patch `first + r` of the batch: image ids[(first+r) /
/// patches], patch (first+r) % patches. A value depends only on (seed, image, patch, column).
struct NoiseArgs {
  float* out;  // [rows, width]
  int64_t first, rows, width, patches;
  uint64_t seed;
  const uint32_t* ids;  // host: one per image
};

/// One number per patch, from the Philox block of (seed, ids[image], patch). From the block's first words: uniform on (0, 1], or
/// sigmoid(mean + std * n) with n standard normal. From its third word: 0 for a fraction `zero` of the patches.
struct DrawArgs {
  float* out;  // [images, patches]
  int64_t images, patches;
  uint64_t seed;
  const uint32_t* ids;  // host: one per image
  bool logit_normal;
  float mean, std;
  float zero = 0;
};

/// out = residual + scale * gate * branch; scale [width] and gate [rows, width] are optional.
struct ScaleAddArgs {
  const void* residual;
  const void* branch;
  void* out;
  DType dtype;  // of all but scale
  int64_t rows, width;
  const float* scale;
  const void* gate;
};

/// d_branch = d_out * scale * gate; d_scale = column sums of d_out * branch; d_gate = d_out * branch. Scale or gate, not both.
struct ScaleAddBackwardArgs {
  const void* d_out;
  const void* branch;
  void* d_branch;
  DType dtype;
  int64_t rows, width;
  const float* scale;
  const void* gate;
  float* d_scale;  // [width] or null
  void* d_gate;    // [rows, width] or null
};

/// Backward pass of NormArgs (without the gated residual). Column sums and the modulation's gradients are optional.
struct NormBackwardArgs {
  const void* x;
  const void* d_out;
  void* d_x;
  DType dtype;
  int64_t rows, width;
  int64_t x_stride, d_stride;  // elements between rows of x; of d_out and d_x
  bool rms;
  float eps;
  const float* weight;
  const float* bias;
  const void* scale;  // [rows, width] or null
  float* d_weight;    // [width] or null
  float* d_bias;      // [width] or null
  void* d_scale;      // [rows, width] or null
  void* d_shift;      // [rows, width] or null
};

/// Layer weights of the distillation loss; `Adaptive` is the paper's.
enum class LayerWeights { Adaptive, Uniform, Last };

/// The distillation loss of all layers (equations: native/ops/losses.h): alpha_l = mean over compared tokens of (1 - cosine), the layer
/// weights, the loss, and d alpha_l / d student_l. Bytes: both stacks read once, the gradient written once.
struct DistillationArgs {
  const void* const* student;  // host: L pointers to [B, S, D]
  const void* const* teacher;  // host: L pointers to [B, S, D]
  void* const* grad;           // host: L pointers to [B, S, D], zero for skipped tokens; or null
  DType dtype;
  int64_t layers, batch, tokens, width;
  int64_t skip;  // leading tokens that are not compared: class and registers
  float beta;
  LayerWeights weights;
  float *loss, *alpha, *weight;  // [1], [L], [L]
};

/// Cross-entropy with natural logarithms, mean over the rows: the loss, its gradient, and the number of rows whose label is the (first)
/// largest logit.
struct CrossEntropyArgs {
  const void* logits;     // [rows, classes]
  const int32_t* labels;  // [rows]
  void* grad;             // [rows, classes]
  DType dtype;            // of logits and grad
  int64_t rows, classes;
  float *loss, *correct;
};

/// One tensor of an AdamW step.
struct AdamWParameter {
  float* parameter;
  const float* grad;
  float *m, *v;
  float* average;  // exponential moving average of the parameter, or null
  void* compute;   // bfloat16 copy of the new value, or null
  int64_t n;
  float lr, weight_decay;
};

/// AdamW over a list of tensors, with the arithmetic of torch.optim.AdamW. Gradients are scaled by clip / (norm + 1e-6) if clip > 0 and
/// norm > clip. Nothing changes if the norm is not finite.
struct AdamWArgs {
  const AdamWParameter* parameters;  // host
  int64_t count;
  const float* norm;  // [1], on the device
  float clip, beta1, beta2, eps, ema;
  float correction1, correction2;  // 1 - beta^step
};

#define UNIFLOW_FIELD(result, name, parameters) result(*name) parameters = nullptr;
/// A backend's kernels (kernel_list.h).
struct Kernels {
  const char* name = nullptr;
  bool native_bfloat16 = false;  // bfloat16 products run in hardware; otherwise they are float32's, at the same speed
  UNIFLOW_KERNELS(UNIFLOW_FIELD)
  UNIFLOW_COMMON_KERNELS(UNIFLOW_FIELD)
};
#undef UNIFLOW_FIELD

/// Used by a backend's header and its table.
#define UNIFLOW_DECLARATION(result, name, parameters) result name parameters;
#define UNIFLOW_ENTRY(result, name, parameters) .name = name,

}  // namespace uniflow
