/// The list of all kernels: X(result, name, (parameters)). It generates the fields of the kernel table, each backend's declarations and
/// each backend's table (kernels.h). Argument structs are described there.
#pragma once

/// On the CPU, compiled once for each instruction set.
#define UNIFLOW_KERNELS(X) \
  /* How a weight [out, in] is stored for products in `dtype`, and in how many bytes. */ \
  X(std::shared_ptr<const Packing>, linear_packing, (int64_t out, int64_t in, DType dtype)) \
  X(int64_t, packed_bytes, (const Packing& packing)) \
  /* [out, in] in C order of `dtype` -> packed, and back. */ \
  X(void, pack, (const Packing& packing, const void* plain, DType dtype, void* packed)) \
  X(void, unpack, (const Packing& packing, const void* packed, void* plain, DType dtype)) \
  X(void, linear, (const LinearArgs&)) \
  X(void, linear_backward, (const LinearBackwardArgs&)) \
  /* Rows of `bytes` bytes, from_stride and to_stride bytes apart; from null: zeros. */ \
  X(void, copy_rows, (void* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t bytes, int64_t rows)) \
  X(void, fill, (float* out, float value, int64_t n)) \
  X(void, attention, (const AttentionArgs&)) \
  X(void, attention_backward, (const AttentionBackwardArgs&)) \
  X(void, norm, (const NormArgs&)) \
  X(void, unfold, (const UnfoldArgs&)) \
  X(void, fold, (const FoldArgs&)) \
  X(void, assemble, (const AssembleArgs&)) \
  X(void, resize_table, (const ResizeTableArgs&)) \
  /* The transpose: `in` is the gradient on the out grid, `out` that on the in grid. */ \
  X(void, resize_table_backward, (const ResizeTableArgs&)) \
  X(void, rope, (const RopeArgs&)) \
  /* Cosines, then sines, [2, rows*cols, head_dim], of the rows' angles and the columns': position * theta^(-4k / head_dim). */ \
  X(void, rope_table, (int64_t rows, int64_t cols, int64_t head_dim, float theta, RopeUnit unit, float* out)) \
  X(void, noise, (const NoiseArgs&)) \
  X(void, draw, (const DrawArgs&)) \
  /* out[i] = x[i] converted; any pair of Float32 and BFloat16. */ \
  X(void, cast, (const void* x, DType from, void* out, DType to, int64_t n)) \
  /* out = silu(x[:, :n]) * x[:, n:], x [rows, 2n]. */ \
  X(void, swiglu, (const void* x, void* out, DType dtype, int64_t rows, int64_t n)) \
  /* out = silu(x + y), x [rows, n], rows of y y_stride apart (0: one row for all), float32 both. */ \
  X(void, silu_sum, (const float* x, const float* y, int64_t y_stride, void* out, DType dtype, int64_t rows, int64_t n)) \
  /* x += dt * (v0 + guidance * (v - v0)), v0 null: x += dt * v. All float32 [n]. */ \
  X(void, euler, (float* x, const float* v, const float* v0, float guidance, float dt, int64_t n)) \
  X(void, activation, (Activation kind, const void* x, void* out, DType dtype, int64_t n)) \
  X(void, activation_backward, (Activation kind, const void* x, const void* d_out, void* d_x, DType dtype, int64_t n)) \
  X(void, scale_add, (const ScaleAddArgs&)) \
  X(void, scale_add_backward, (const ScaleAddBackwardArgs&)) \
  X(void, swiglu_backward, (const void* x, const void* d_out, void* d_x, DType dtype, int64_t rows, int64_t n)) \
  /* out = a + factor[0] * scale * b; a may be null (zero), factor null (one). */ \
  X(void, add, (const void* a, const void* b, const float* factor, float scale, void* out, DType dtype, int64_t n)) \
  /* out [width] = sum over the rows of x. */ \
  X(void, column_sum, (const void* x, float* out, DType dtype, int64_t rows, int64_t width)) \
  X(void, norm_backward, (const NormBackwardArgs&)) \
  X(void, distillation, (const DistillationArgs&)) \
  /* Returns how many labels are no class (a GPU is waited for); where there is one, the results mean nothing. */ \
  X(int64_t, cross_entropy, (const CrossEntropyArgs&)) \
  /* n latents, channel i % levels.count each: x -> quantised latents; the straight-through gradient. */ \
  X(void, fsq, (const Levels& levels, const void* x, void* out, DType dtype, int64_t n)) \
  X(void, fsq_backward, (const Levels& levels, const void* x, const void* d_out, void* d_x, DType dtype, int64_t n)) \
  /* latents [groups, levels.count] -> codes [groups]. */ \
  X(void, latents_to_codes, (const Levels& levels, const void* latents, int32_t* codes, DType dtype, int64_t groups)) \
  /* The inverse, in float32. Returns how many codes do not exist (a GPU is waited for); their latents mean nothing. */ \
  X(int64_t, codes_to_latents, (const Levels& levels, const int32_t* codes, float* latents, int64_t groups)) \
  /* out[0] = root of the sum of squares over all tensors (lists on the host), summed in float64 in an order that is always the same. */ \
  X(void, global_norm, (const float* const* x, const int64_t* n, int64_t count, float* out)) \
  X(void, adamw, (const AdamWArgs&)) \
  /* loss[0] = mean of (v - target)^2 over n elements; grad = 2 (v - target) / n where given. */ \
  X(void, mean_squared_error, (const float* v, const float* target, float* grad, float* loss, int64_t n)) \
  /* noisy = t * data + (1 - t) * noise, target = data - noise; t one per row. */ \
  X(void, interpolate, (const float* data, const float* noise, const float* t, float* noisy, float* target, int64_t rows, int64_t width)) \
  /* a GPU is waited for */ \
  X(int64_t, count_non_finite, (const float* x, int64_t n)) \
  /* The k largest of each row of scores [rows, n], descending; of equal ones the lowest index first, NaN last. */ \
  X(void, top_k, (const float* scores, int64_t rows, int64_t n, int64_t k, float* values, int32_t* indices)) \
  /* Of the columns of x [rows, width]: mean [width], covariance [width, width] with divisor rows - 1. */ \
  X(void, covariance, (const float* x, int64_t rows, int64_t width, float* mean, float* covariance)) \
  /* The yardsticks of every benchmark. FLOP/s: on the CPU of multiply-adds in registers with the current team, the best of a few; on a GPU */ \
  /* of a product of large matrices, the median under load. Bytes (read + written) a second of a copy from memory to memory. Both wait. */ \
  X(double, peak, (DType dtype)) \
  X(double, copy_rate, (void* to, const void* from, int64_t bytes))

/// On the CPU, the same for all instruction sets: they call the others, or choose for themselves.
#define UNIFLOW_COMMON_KERNELS(X) \
  X(void, flow_integrate, (const FlowHead& head, const Tensor& condition, const ops::FlowOptions& options, const Tensor& pixels, const CancelToken& token)) \
  X(void, flow_velocity, (const FlowHead& head, const Tensor& x, const Tensor& t, const Tensor& condition, const Tensor& velocity)) \
  /* t [count] -> [count, 256]: cosines, then sines, of 1000 t * 10000^(-i/128). */ \
  X(void, timestep_embedding, (const float* t, int64_t count, float* out)) \
  /* a, b uint8 [images, height, width, 3] -> out [images, 2]: PSNR, SSIM. */ \
  X(void, image_quality, (const uint8_t* a, const uint8_t* b, float* out, int64_t images, int64_t height, int64_t width, SsimConvention convention))
