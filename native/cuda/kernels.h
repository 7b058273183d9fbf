/// The GPU's kernels, under the names of native/ops/kernels.h; the files have the stems of native/cpu.
#pragma once

#include "native/ops/kernels.h"

namespace uniflow::cuda {

/// All of these.
const Kernels& kernels();

// linear.cu
std::shared_ptr<const Packing> linear_packing(int64_t out, int64_t in, DType dtype);
int64_t packed_bytes(const Packing&);
void pack(const Packing&, const void* plain, DType dtype, void* packed);
void unpack(const Packing&, const void* packed, void* plain, DType dtype);
void linear(const LinearArgs&);
void linear_backward(const LinearBackwardArgs&);
double peak(DType);

// flow.cu
void flow_integrate(const FlowHead&, const Tensor& condition, const ops::FlowOptions&, const Tensor& pixels, const CancelToken&);
void flow_velocity(const FlowHead&, const Tensor& x, const Tensor& t, const Tensor& condition, const Tensor& velocity);
void time_waves(const float*, int64_t, float*);

// attention.cu, attention_backward.cu
void attention(const AttentionArgs&);
void attention_backward(const AttentionBackwardArgs&);

// norm.cu
void norm(const NormArgs&);
void norm_backward(const NormBackwardArgs&);

// patch.cu
void unfold(const UnfoldArgs&);
void fold(const FoldArgs&);
void assemble(const AssembleArgs&);
void resize_table(const ResizeTableArgs&);
void resize_table_backward(const ResizeTableArgs&);

// elementwise.cu
void rope(const RopeArgs&);
void rope_table(int64_t rows, int64_t cols, int64_t head_dim, float theta, RopeUnit unit, float* out);
void cast(const void*, DType, void*, DType, int64_t);
void swiglu(const void*, void*, DType, int64_t, int64_t);
void silu_sum(const float*, const float*, int64_t, void*, DType, int64_t, int64_t);
void euler(float*, const float*, const float*, float, float, int64_t);
int64_t count_non_finite(const float*, int64_t);
void copy_rows(void*, int64_t, const void*, int64_t, int64_t, int64_t);
void fill(float*, float, int64_t);
double copy_rate(void*, const void*, int64_t);

// random.cu
void noise(const NoiseArgs&);
void draw(const DrawArgs&);

// residual.cu
void activation(Activation, const void*, void*, DType, int64_t);
void activation_backward(Activation, const void*, const void*, void*, DType, int64_t);
void scale_add(const ScaleAddArgs&);
void scale_add_backward(const ScaleAddBackwardArgs&);
void swiglu_backward(const void*, const void*, void*, DType, int64_t, int64_t);
void add(const void*, const void*, const float*, float, void*, DType, int64_t);
void column_sum(const void*, float*, DType, int64_t, int64_t);

// distillation.cu, cross_entropy.cu, optimizer.cu
void distillation(const DistillationArgs&);
int64_t cross_entropy(const CrossEntropyArgs&);
void global_norm(const float* const*, const int64_t*, int64_t, float*);
void adamw(const AdamWArgs&);
void mean_squared_error(const float*, const float*, float*, float*, int64_t);
void interpolate(const float*, const float*, const float*, float*, float*, int64_t, int64_t);

// statistics.cu, quality.cu
void top_k(const float*, int64_t, int64_t, int64_t, float*, int32_t*);
void covariance(const float*, int64_t, int64_t, float*, float*);
void image_quality(const uint8_t*, const uint8_t*, float*, int64_t, int64_t, int64_t, SsimConvention);

}  // namespace uniflow::cuda
