/// What a device computes: one table of functions, which each backend fills with its own kernels (native/cpu, native/cuda).
///
/// A kernel takes raw pointers into the device's memory and sizes, checked by native/ops before; it runs on the device's stream and
/// after what was given to it before. Kernels of the CPU never throw; those of a GPU may (OutOfMemory, Unsupported, Internal). `dtype` is
/// Float32 or BFloat16 unless said otherwise; arithmetic is float32 throughout. All float pointers named weight, bias, table are float32.
/// Lists of pointers (`const float* const*`), and what is marked "host", are in the host's memory on every device.
#pragma once

#include <cstdint>
#include <memory>

#include "native/core/activation.h"
#include "native/core/dtype.h"
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
  const void* weight;      // [out, in], as `packing` says
  const Packing* packing;  // null: C order, of x_dtype
  void* out;               // [rows, out]
  int64_t rows, in, width;  // width: of out
  DType x_dtype, out_dtype;
  const float* bias = nullptr;      // [out]
  const float* scale = nullptr;     // [out]
  const void* residual = nullptr;   // [rows, out], of out_dtype; not out itself
  Activation activation = Activation::None;
};

/// Gradients of out = x W^T + b. FLOPs 2*rows*out*in each.
struct LinearBackwardArgs {
  const void* x;       // [rows, in]
  const void* weight;  // [out, in] in C order
  const void* d_out;   // [rows, out]
  DType dtype;         // of x, weight, d_out, d_x
  int64_t rows, in, out;
  void* d_x = nullptr;        // [rows, in], or not asked for
  float* d_weight = nullptr;  // [out, in], or not asked for
  float* d_bias = nullptr;    // [out], or not asked for
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

/// What AttentionArgs computes, backwards; the scores are computed again, by blocks. FLOPs 10*B*H*S*S*E.
struct AttentionBackwardArgs {
  const void* qkv;           // [B, S, 3*H*E]
  const void* out;           // [B, S, H*E], of the forward pass
  const void* d_out;         // [B, S, H*E]
  const float* log_sum_exp;  // [B, H, S], of the forward pass
  void* d_qkv;               // [B, S, 3*H*E], overwritten
  DType dtype;               // of all but log_sum_exp
  int64_t batch, seq, heads, head_dim;
  float scale;
};

/// h' = h + gate * branch (where branch is given), then out = normalise(h') * weight + bias, then
/// out * (1 + scale) + shift (where scale is given). Bytes: each row read once, written once. A GPU keeps a row in registers: it takes
/// up to 8192 columns, here and backwards.
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
  // AdaLN, all of out_dtype, rows `modulation_stride` apart; null where absent
  const void* shift = nullptr;
  const void* scale = nullptr;
  int64_t modulation_stride = 0;
  // gated residual, written back to `residual` before normalising
  float* residual = nullptr;     // [rows, width] float32, then x is unused
  const void* branch = nullptr;  // [rows, width] of out_dtype
  const void* gate = nullptr;    // [rows, width] of out_dtype, rows gate_stride apart
  int64_t gate_stride = 0;
};

/// Pixels to patch vectors, channel slowest inside a patch: (c, row, column).
struct UnfoldArgs {
  const void* pixels;  // UInt8 [B, H, W, 3], normalised on the way, or Float32 [B, 3, H, W], taken as it is
  DType pixel_dtype;
  void* out;  // [B * floor(H/p) * floor(W/p), 3*p*p]
  DType dtype;
  int64_t batch, height, width, patch;
  float mean[3], std[3];
};

/// Patch vectors to pixels: the inverse of UnfoldArgs.
struct FoldArgs {
  const float* patches;  // [B*N, 3*p*p], rows [first, first + rows) of it
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

/// Rotary positions on the q and k of [B, S, 3*H*E], tokens from `prefix` on; the rest is copied.
/// Pairs are (i, i + E/2). cosine and sine are [S - prefix, E].
struct RopeArgs {
  const void* qkv;
  void* out;
  DType dtype;
  int64_t batch, seq, heads, head_dim, prefix;
  const float* cosine;
  const float* sine;
  bool inverse = false;  // turns the other way: the gradient
};

/// Standard normal numbers by Philox4x32-10 and Box-Muller. Row r of the output is patch `first + r` counted over
/// the batch: image ids[(first+r) / patches], patch (first+r) % patches. Independent of everything but
/// (seed, image, patch, column).
struct NoiseArgs {
  float* out;  // [rows, width]
  int64_t first, rows, width, patches;
  uint64_t seed;
  const uint32_t* ids;  // host: one per image
};

/// One number for each patch, from the Philox block of (seed, ids[image], patch): uniform on (0, 1], or sigmoid(mean + std * n) with n standard normal,
/// from its first words; 0 for a share `zero` of the patches, from its third.
struct DrawArgs {
  float* out;  // [images, patches]
  int64_t images, patches;
  uint64_t seed;
  const uint32_t* ids;  // host: one per image
  bool logit_normal;
  float mean, std;
  float zero = 0;
};

/// out = residual + scale * gate * branch; scale [width] and gate [rows, width] where given.
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

/// What NormArgs computes (without the gated residual), backwards. Column sums and the modulation's gradients where asked for.
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

/// How the distillation loss weights its layers; `Adaptive` is the paper's.
enum class LayerWeights { Adaptive, Uniform, Last };

/// The distillation loss of all layers (native/ops/losses.h has the equations): alpha_l = mean over compared tokens of (1 - cosine), the
/// layers' weights, the loss, and d alpha_l / d student_l. Bytes: both stacks read once, the gradient written once.
struct DistillationArgs {
  const void* const* student;  // host: L pointers to [B, S, D]
  const void* const* teacher;  // host: L pointers to [B, S, D]
  void* const* grad;           // host: L pointers to [B, S, D], zero for skipped tokens; or null
  DType dtype;
  int64_t layers, batch, tokens, width;
  int64_t skip;  // tokens in front that are not compared: class and registers
  float beta;
  LayerWeights weights;
  float *loss, *alpha, *weight;  // [1], [L], [L]
};

/// Cross-entropy with natural logarithms, mean over the rows: loss, its gradient, and how many rows have their label as the
/// (first) largest logit.
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
  void* compute;   // where the new value goes as bfloat16, or null
  int64_t n;
  float lr, weight_decay;
};

/// AdamW over a list of tensors; the arithmetic is torch.optim.AdamW's. Gradients are scaled by clip / (norm + 1e-6) where clip > 0 and
/// norm > clip. Where the norm is not finite, nothing changes.
struct AdamWArgs {
  const AdamWParameter* parameters;  // host
  int64_t count;
  const float* norm;  // [1], on the device
  float clip, beta1, beta2, eps, ema;
  float correction1, correction2;  // 1 - beta^step
};

#define UNIFLOW_FIELD(result, name, parameters) result(*name) parameters = nullptr;
/// A backend: all kernels, of kernel_list.h.
struct Kernels {
  const char* name = nullptr;
  bool native_bfloat16 = false;  // products of bfloat16 in hardware; elsewhere they are float32's, and as fast
  UNIFLOW_KERNELS(UNIFLOW_FIELD)
  UNIFLOW_COMMON_KERNELS(UNIFLOW_FIELD)
};
#undef UNIFLOW_FIELD

/// For a backend's header and its table.
#define UNIFLOW_DECLARATION(result, name, parameters) result name parameters;
#define UNIFLOW_ENTRY(result, name, parameters) .name = name,

}  // namespace uniflow
