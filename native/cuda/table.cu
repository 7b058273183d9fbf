/// The GPU's table of kernels, and the library's door.
#include "native/cuda/backend.h"
#include "native/cuda/kernels.h"
#include "native/cuda/library.h"

namespace uniflow::cuda {

const Kernels& kernels() {
  static const Kernels table = {
      .name = "CUDA",
      .native_bfloat16 = true,
      .linear_packing = cuda::linear_packing,
      .packed_bytes = cuda::packed_bytes,
      .pack = cuda::pack,
      .unpack = cuda::unpack,
      .linear = cuda::linear,
      .linear_backward = cuda::linear_backward,
      .flow_integrate = cuda::flow_integrate,
      .flow_velocity = cuda::flow_velocity,
      .time_waves = cuda::time_waves,
      .copy_rows = cuda::copy_rows,
      .fill = cuda::fill,
      .attention = cuda::attention,
      .attention_backward = cuda::attention_backward,
      .norm = cuda::norm,
      .unfold = cuda::unfold,
      .fold = cuda::fold,
      .assemble = cuda::assemble,
      .resize_table = cuda::resize_table,
      .resize_table_backward = cuda::resize_table_backward,
      .rope = cuda::rope,
      .rope_table = cuda::rope_table,
      .noise = cuda::noise,
      .draw = cuda::draw,
      .cast = cuda::cast,
      .swiglu = cuda::swiglu,
      .silu_sum = cuda::silu_sum,
      .euler = cuda::euler,
      .activation = cuda::activation,
      .activation_backward = cuda::activation_backward,
      .scale_add = cuda::scale_add,
      .scale_add_backward = cuda::scale_add_backward,
      .swiglu_backward = cuda::swiglu_backward,
      .add = cuda::add,
      .column_sum = cuda::column_sum,
      .norm_backward = cuda::norm_backward,
      .distillation = cuda::distillation,
      .cross_entropy = cuda::cross_entropy,
      .global_norm = cuda::global_norm,
      .adamw = cuda::adamw,
      .mean_squared_error = cuda::mean_squared_error,
      .interpolate = cuda::interpolate,
      .count_non_finite = cuda::count_non_finite,
      .top_k = cuda::top_k,
      .covariance = cuda::covariance,
      .image_quality = cuda::image_quality,
      .peak = cuda::peak,
      .copy_rate = cuda::copy_rate,
  };
  return table;
}

const Kernels& CudaBackend::kernels() const { return cuda::kernels(); }

}  // namespace uniflow::cuda

/// What library.cpp looks up.
extern "C" [[gnu::visibility("default")]] const uniflow::cuda::Library* uniflow_cuda_library() {
  static const uniflow::cuda::Library library = {uniflow::cuda::kLibraryVersion, uniflow::cuda::device_count, uniflow::cuda::describe, uniflow::cuda::open};
  return &library;
}
