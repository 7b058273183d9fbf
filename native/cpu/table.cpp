/// The kernels of one instruction set; compiled once for each.
#include "native/cpu/kernels.h"

#define UNIFLOW_STRING_OF(x) #x
#define UNIFLOW_STRING(x) UNIFLOW_STRING_OF(x)

namespace uniflow::cpu::UNIFLOW_ISA {

std::shared_ptr<const Packing> linear_packing(int64_t, int64_t, DType);
int64_t packed_bytes(const Packing&);
void pack(const Packing&, const void*, DType, void*);
void unpack(const Packing&, const void*, void*, DType);
void linear(const LinearArgs&);
void linear_backward(const LinearBackwardArgs&);
void attention(const AttentionArgs&);
void attention_backward(const AttentionBackwardArgs&);
void norm(const NormArgs&);
void norm_backward(const NormBackwardArgs&);
void unfold(const UnfoldArgs&);
void fold(const FoldArgs&);
void assemble(const AssembleArgs&);
void resize_table(const ResizeTableArgs&);
void resize_table_backward(const ResizeTableArgs&);
void rope(const RopeArgs&);
void rope_table(int64_t, int64_t, int64_t, float, RopeUnit, float*);
void noise(const NoiseArgs&);
void draw(const DrawArgs&);
void copy_rows(void*, int64_t, const void*, int64_t, int64_t, int64_t);
void fill(float*, float, int64_t);
void cast(const void*, DType, void*, DType, int64_t);
void swiglu(const void*, void*, DType, int64_t, int64_t);
void swiglu_backward(const void*, const void*, void*, DType, int64_t, int64_t);
void silu_sum(const float*, const float*, int64_t, void*, DType, int64_t, int64_t);
void euler(float*, const float*, const float*, float, float, int64_t);
void activation(Activation, const void*, void*, DType, int64_t);
void activation_backward(Activation, const void*, const void*, void*, DType, int64_t);
void scale_add(const ScaleAddArgs&);
void scale_add_backward(const ScaleAddBackwardArgs&);
void add(const void*, const void*, const float*, float, void*, DType, int64_t);
void column_sum(const void*, float*, DType, int64_t, int64_t);
void distillation(const DistillationArgs&);
int64_t cross_entropy(const CrossEntropyArgs&);
void global_norm(const float* const*, const int64_t*, int64_t, float*);
void adamw(const AdamWArgs&);
void mean_squared_error(const float*, const float*, float*, float*, int64_t);
void interpolate(const float*, const float*, const float*, float*, float*, int64_t, int64_t);
int64_t count_non_finite(const float*, int64_t);
void top_k(const float*, int64_t, int64_t, int64_t, float*, int32_t*);
void covariance(const float*, int64_t, int64_t, float*, float*);
double peak(DType);
double copy_rate(void*, const void*, int64_t);

extern const Kernels table;
/// What does not depend on the instruction set is filled in by isa.cpp.
const Kernels table = {
    .name = UNIFLOW_STRING(UNIFLOW_ISA),
#if defined(__AVX512BF16__)
    .native_bfloat16 = true,
#else
    .native_bfloat16 = false,
#endif
    .linear_packing = linear_packing,
    .packed_bytes = packed_bytes,
    .pack = pack,
    .unpack = unpack,
    .linear = linear,
    .linear_backward = linear_backward,
    .flow_integrate = nullptr,
    .flow_velocity = nullptr,
    .time_waves = nullptr,
    .copy_rows = copy_rows,
    .fill = fill,
    .attention = attention,
    .attention_backward = attention_backward,
    .norm = norm,
    .unfold = unfold,
    .fold = fold,
    .assemble = assemble,
    .resize_table = resize_table,
    .resize_table_backward = resize_table_backward,
    .rope = rope,
    .rope_table = rope_table,
    .noise = noise,
    .draw = draw,
    .cast = cast,
    .swiglu = swiglu,
    .silu_sum = silu_sum,
    .euler = euler,
    .activation = activation,
    .activation_backward = activation_backward,
    .scale_add = scale_add,
    .scale_add_backward = scale_add_backward,
    .swiglu_backward = swiglu_backward,
    .add = add,
    .column_sum = column_sum,
    .norm_backward = norm_backward,
    .distillation = distillation,
    .cross_entropy = cross_entropy,
    .global_norm = global_norm,
    .adamw = adamw,
    .mean_squared_error = mean_squared_error,
    .interpolate = interpolate,
    .count_non_finite = count_non_finite,
    .top_k = top_k,
    .covariance = covariance,
    .image_quality = nullptr,
    .peak = peak,
    .copy_rate = copy_rate,
};

}  // namespace uniflow::cpu::UNIFLOW_ISA
