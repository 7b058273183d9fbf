/// The kernels of one instruction set; compiled once for each.
#include "native/cpu/kernels.h"

#define UNIFLOW_STRING_OF(x) #x
#define UNIFLOW_STRING(x) UNIFLOW_STRING_OF(x)

namespace uniflow::cpu::UNIFLOW_ISA {

void attention(const AttentionArgs&);
void attention_backward(const AttentionBackwardArgs&);
void norm(const NormArgs&);
void unfold(const UnfoldArgs&);
void fold(const FoldArgs&);
void assemble(const AssembleArgs&);
void resize_table(const ResizeTableArgs&);
void resize_table_backward(const ResizeTableArgs&);
void rope(const RopeArgs&);
void noise(const NoiseArgs&);
void cast(const void*, DType, void*, DType, int64_t);
void swiglu(const void*, void*, DType, int64_t, int64_t);
void silu_sum(const float*, const float*, int64_t, void*, DType, int64_t, int64_t);
void euler(float*, const float*, const float*, float, float, int64_t);
void activation(Activation, const void*, void*, DType, int64_t);
void activation_backward(Activation, const void*, const void*, void*, DType, int64_t);
void scale_add(const ScaleAddArgs&);
void scale_add_backward(const ScaleAddBackwardArgs&);
void swiglu_backward(const void*, const void*, void*, DType, int64_t, int64_t);
void add(const void*, const void*, const float*, float, void*, DType, int64_t);
void column_sum(const void*, float*, DType, int64_t, int64_t);
void norm_backward(const NormBackwardArgs&);
float distillation(const DistillationArgs&);
int64_t cross_entropy(const CrossEntropyArgs&);
double sum_of_squares(const float*, int64_t);
void adamw(const AdamWArgs&);
double mean_squared_error(const float*, const float*, float*, int64_t);
void interpolate(const float*, const float*, const float*, float*, float*, int64_t, int64_t);
int64_t count_non_finite(const float*, int64_t);
void top_k(const float*, int64_t, int64_t, int64_t, float*, int32_t*);
void covariance(const float*, int64_t, int64_t, float*, float*);
double fma_peak(DType);
double copy_rate(void*, const void*, int64_t);

extern const Kernels table;
const Kernels table = {UNIFLOW_STRING(UNIFLOW_ISA), attention, attention_backward, norm, unfold, fold, assemble, resize_table, resize_table_backward, rope, noise, cast, swiglu,
                       silu_sum, euler,
                       activation, activation_backward, scale_add, scale_add_backward, swiglu_backward, add, column_sum, norm_backward,
                       distillation, cross_entropy, sum_of_squares, adamw, mean_squared_error, interpolate, count_non_finite, top_k, covariance,
                       fma_peak, copy_rate};

}  // namespace uniflow::cpu::UNIFLOW_ISA
