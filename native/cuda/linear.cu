/// Linear layers: the product by cuBLASLt, and everything it cannot do itself in one pass over the result.
///
/// cuBLASLt can add a bias and a residual and apply the tanh GELU; a layer that needs no more is a single product. Otherwise
/// epilogue_kernel passes over the product once, in place: a thread has 16 bytes of kRowsEach rows, with the bias and scale of its columns
/// in registers. Roofline bound of the product: FLOPs; of the epilogue: the result read and written, the residual read.
///
/// In bfloat16 the product is rounded once before the epilogue (except if the library does everything). The bias added by the library is
/// rounded to bfloat16 as well, because it accepts no other type then. What the library refuses is done by multiply_tiled().
#include <sizes.h>

#include <algorithm>
#include <bit>
#include <vector>

#include "native/cuda/activation.cuh"
#include "native/cuda/float8.cuh"
#include "native/cuda/kernels.h"
#include "native/cuda/gemm.h"
#include "native/cuda/vectors.cuh"

namespace uniflow::cuda {
namespace {

// --- weights -----------------------------------------------------------------------------------------------------------

/// [out, stride] in C order, zero from column `in` on. Rows are multiples of 16 bytes, because the tensor cores' fast loads take no others.
/// For Float8, followed by a factor for each of the `out` rows.
struct LinearPacking : Packing {
  LinearPacking(int64_t out, int64_t in, DType dtype) : out(out), in(in), stride(round_up(in, 16 / size_of(dtype))), dtype(dtype) {}
  int64_t out, in, stride;
  DType dtype;

  static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
  int64_t factors_at() const { return out * stride; }
  const float* factors(const void* packed) const { return reinterpret_cast<const float*>(as<uint8_t>(packed) + factors_at()); }
};

const LinearPacking& of(const Packing& p) { return static_cast<const LinearPacking&>(p); }

/// Checked late, because a packing is created without a device.
void require_float8() {
  if (const int capability = properties().capability; capability < 89)
    throw Error(ErrorCode::Unsupported, "dtype", "float32 or bfloat16 on this GPU (float8 needs compute capability 8.9)",
                "float8 on one of " + std::to_string(capability / 10) + "." + std::to_string(capability % 10));
}

// --- the epilogue ------------------------------------------------------------------------------------------------------

constexpr int kRowsEach = 4;

/// out = residual + scale * act(product * row_scale * column_scale + bias); null pointers are skipped.
template <class In, class Out>
struct Epilogue {
  const In* product;  // may alias out
  Out* out;
  int64_t rows, width;
  const float *bias, *scale, *row_scale, *column_scale;
  const Out* residual;
};

/// Block (rows, columns): threadIdx.x indexes vectors of N columns, threadIdx.y rows.
template <Activation K, int N, class In, class Out>
__global__ void __launch_bounds__(kEachBlock) epilogue_kernel(Epilogue<In, Out> e) {
  const int64_t column = (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * N;
  const int64_t first = int64_t{blockIdx.x} * blockDim.y * kRowsEach + threadIdx.y;
  if (column >= e.width) return;
  Pack<In, N> product[kRowsEach];  // in the stored type: half the registers
  Pack<Out, N> residual[kRowsEach];
#pragma unroll
  for (int i = 0; i < kRowsEach; ++i) {
    const int64_t row = first + int64_t{i} * blockDim.y, at = row * e.width + column;
    if (row >= e.rows) break;
    product[i] = *reinterpret_cast<const Pack<In, N>*>(e.product + at);
    if (e.residual) residual[i] = *reinterpret_cast<const Pack<Out, N>*>(e.residual + at);
  }
  float bias[N], scale[N], column_scale[N];
  load_or<N>(e.bias, column, 0.0f, bias);
  load_or<N>(e.scale, column, 1.0f, scale);
  load_or<N>(e.column_scale, column, 1.0f, column_scale);
#pragma unroll
  for (int i = 0; i < kRowsEach; ++i) {
    const int64_t row = first + int64_t{i} * blockDim.y;
    if (row >= e.rows) break;
    const float row_scale = e.row_scale ? e.row_scale[row] : 1.0f;
    float v[N];
#pragma unroll
    for (int k = 0; k < N; ++k) {
      v[k] = scale[k] * activate<K>(to_f32(product[i].v[k]) * (row_scale * column_scale[k]) + bias[k]);
      if (e.residual) v[k] += to_f32(residual[i].v[k]);
    }
    store<N>(e.out + row * e.width + column, v);
  }
}

template <Activation K, int N, class In, class Out>
void launch_epilogue(const Epilogue<In, Out>& e) {
  const int64_t vectors = (e.width + N - 1) / N;
  const auto across = static_cast<unsigned>(std::min<int64_t>(std::bit_ceil(static_cast<uint64_t>(vectors)), kEachBlock));
  const unsigned down = kEachBlock / across;
  const dim3 grid(blocks_for(e.rows, int64_t{down} * kRowsEach), blocks_for(vectors, across));
  launch(epilogue_kernel<K, N, In, Out>, grid, dim3(across, down), 0, e);
}

template <class In, class Out>
void run_epilogue(const LinearArgs& a, const void* product, const float* row_scale, const float* column_scale) {
  constexpr int N = kVectorOf<In, Out>;
  const Epilogue<In, Out> e{as<In>(product), as<Out>(a.out), a.rows,       a.width, a.bias,
                            a.scale,         row_scale,      column_scale, as<Out>(a.residual)};
  const bool vectors = a.width % N == 0 && aligned({product, a.out, a.bias, a.scale, column_scale, a.residual});
  with_activation(a.activation, [&]<Activation K>(std::integral_constant<Activation, K>) {
    if (vectors) launch_epilogue<K, N>(e);
    else launch_epilogue<K, 1>(e);
  });
}

// --- the product ---------------------------------------------------------------------------------------------------------

void product(const Product& p) {
  if (!multiply(p)) multiply_tiled(p);
}

/// Returns whether the library did the whole layer. `p` is the product alone, written to a.out.
bool multiply_with_epilogue(Product p, const LinearArgs& a) {
  const bool activates = a.activation != Activation::None, tanh = a.activation == Activation::GeluTanh && !a.residual;
  if (a.scale || (activates && !tanh) || !aligned({a.bias})) return false;
  p.add = a.residual;
  p.gelu_tanh = tanh;
  if (!a.bias) return multiply(p);
  p.bias = a.bias;
  p.bias_dtype = a.out_dtype;  // the library accepts no other type
  Tensor rounded;
  if (a.out_dtype == DType::BFloat16) {
    rounded = scratch(DType::BFloat16, {a.width});
    cast(a.bias, DType::Float32, rounded.data(), DType::BFloat16, a.width);
    p.bias = rounded.data();
  }
  return multiply(p);
}

/// [rows, in] -> [rows, stride], the new columns zero.
void pad_rows(const void* from, void* to, int64_t rows, int64_t in, int64_t stride, DType dtype) {
  const int64_t bytes = in * size_of(dtype), stride_bytes = stride * size_of(dtype);
  copy_rows(to, stride_bytes, from, bytes, bytes, rows);
  copy_rows(as<std::byte>(to) + bytes, stride_bytes, nullptr, 0, stride_bytes - bytes, rows);
}

/// x in the form that the product requires: the weight's type, and rows as long as the weight's.
struct Input {
  Input(const LinearArgs& a, DType dtype, int64_t stride) : data(a.x) {
    if (dtype == DType::Float8) quantise(a);
    else if (dtype != a.x_dtype) convert(a, dtype);
    if (stride == a.in) return;
    padded = scratch(dtype, {a.rows, stride});
    pad_rows(data, padded.data(), a.rows, a.in, stride, dtype);
    data = padded.data();
  }
  const void* data;
  Tensor converted, scale, padded;

 private:
  void quantise(const LinearArgs& a) {
    converted = scratch(DType::Float8, {a.rows, a.in});
    scale = scratch(DType::Float32, {a.rows});
    quantise_rows(a.x, a.x_dtype, converted.data<uint8_t>(), scale.data<float>(), a.rows, a.in);
    data = converted.data();
  }
  void convert(const LinearArgs& a, DType dtype) {
    converted = scratch(dtype, {a.rows, a.in});
    cast(a.x, a.x_dtype, converted.data(), dtype, a.rows * a.in);
    data = converted.data();
  }
};

}  // namespace

// --- the functions of kernels.h ----------------------------------------------------------------------------------------------

std::shared_ptr<const Packing> linear_packing(int64_t out, int64_t in, DType dtype) {
  if (dtype == DType::Int8) throw Error(ErrorCode::Unsupported, "dtype", "float32, bfloat16 or float8 on a GPU", "int8");
  if (dtype == DType::Float8 && (out % 16 != 0 || in % 16 != 0))
    throw Error(ErrorCode::Unsupported, "weight", "a width and a height that are multiples of 16 for float8",
                "[" + std::to_string(out) + ", " + std::to_string(in) + "]");
  return std::make_shared<LinearPacking>(out, in, dtype);
}

int64_t packed_bytes(const Packing& packing) {
  const LinearPacking& p = of(packing);
  return p.out * p.stride * size_of(p.dtype) + (p.dtype == DType::Float8 ? p.out * size_of(DType::Float32) : 0);
}

void pack(const Packing& packing, const void* plain, DType dtype, void* packed) {
  const LinearPacking& p = of(packing);
  if (p.dtype == DType::Float8) {
    require_float8();
    return quantise_rows(plain, dtype, as<uint8_t>(packed), const_cast<float*>(p.factors(packed)), p.out, p.in);
  }
  if (p.stride == p.in) return cast(plain, dtype, packed, p.dtype, p.out * p.in);
  const Tensor converted = scratch(p.dtype, {p.out, p.in});
  cast(plain, dtype, converted.data(), p.dtype, p.out * p.in);
  pad_rows(converted.data(), packed, p.out, p.in, p.stride, p.dtype);
}

void unpack(const Packing& packing, const void* packed, void* plain, DType dtype) {
  const LinearPacking& p = of(packing);
  if (p.dtype == DType::Float8) return dequantise_rows(as<uint8_t>(packed), p.factors(packed), plain, dtype, p.out, p.in);
  if (p.stride == p.in) return cast(packed, p.dtype, plain, dtype, p.out * p.in);
  const Tensor rows = scratch(p.dtype, {p.out, p.in});
  const int64_t bytes = p.in * size_of(p.dtype);
  copy_rows(rows.data(), bytes, packed, p.stride * size_of(p.dtype), bytes, p.out);
  cast(rows.data(), p.dtype, plain, dtype, p.out * p.in);
}

void linear(const LinearArgs& a) {
  const DType dtype = a.packing ? of(*a.packing).dtype : a.x_dtype;
  const int64_t stride = a.packing ? of(*a.packing).stride : a.in;
  const Input x(a, dtype, stride);
  Product p{.a = x.data, .b = a.weight, .out = a.out, .rows = a.rows, .inner = stride, .columns = a.width, .dtype = dtype,
            .out_dtype = a.out_dtype, .b_transposed = true};
  const float* column_scale = nullptr;
  if (dtype == DType::Float8) {
    column_scale = of(*a.packing).factors(a.weight);
    p.a_scale = x.scale.data<float>();
    p.b_scale = column_scale;
  }
  Tensor wide;  // float32 products cannot have a bfloat16 result
  if (dtype == DType::Float32 && a.out_dtype == DType::BFloat16) {
    wide = scratch(DType::Float32, {a.rows, a.width});
    p.out = wide.data();
    p.out_dtype = DType::Float32;
  }
  if (!wide && multiply_with_epilogue(p, a)) return;
  const float* row_scale = nullptr;
  if (dtype != DType::Float8) {
    product(p);
  } else if (multiply(p)) {
    column_scale = nullptr;
  } else {  // row and column scales need Hopper and a newer library; otherwise the epilogue applies them
    row_scale = std::exchange(p.a_scale, nullptr);
    p.b_scale = nullptr;
    product(p);
  }
  if (wide) run_epilogue<float, bf16>(a, p.out, nullptr, nullptr);
  else if (a.out_dtype == DType::BFloat16) run_epilogue<bf16, bf16>(a, p.out, row_scale, column_scale);
  else run_epilogue<float, float>(a, p.out, row_scale, column_scale);
}

void linear_backward(const LinearBackwardArgs& a) {
  if (a.d_x)
    product({.a = a.d_out, .b = a.weight, .out = a.d_x, .rows = a.rows, .inner = a.out, .columns = a.in, .dtype = a.dtype,
                       .out_dtype = a.dtype});
  if (a.d_weight)
    product({.a = a.d_out, .b = a.x, .out = a.d_weight, .rows = a.out, .inner = a.rows, .columns = a.in, .dtype = a.dtype,
                       .out_dtype = DType::Float32, .a_transposed = true});
  if (a.d_bias) column_sum(a.d_out, a.d_bias, a.dtype, a.rows, a.out);
}

// --- the yardstick -------------------------------------------------------------------------------------------------------------

namespace {

/// Normal numbers: the speed of tensor cores depends on the operands, and zeros take the least power.
Tensor random_matrix(int64_t n, DType dtype, uint64_t seed) {
  const uint32_t image = 0;
  Tensor values = scratch(DType::Float32, {n, n});
  noise({.out = values.data<float>(), .first = 0, .rows = n, .width = n, .patches = n, .seed = seed, .ids = &image});
  if (dtype == DType::Float32) return values;
  const auto packing = linear_packing(n, n, dtype);
  Tensor matrix = scratch(DType::UInt8, {packed_bytes(*packing)});
  pack(*packing, values.data(), DType::Float32, matrix.data());
  return matrix;
}

}  // namespace

double peak(DType dtype) {
  const int64_t n = peak_size(dtype);
  const Tensor a = random_matrix(n, dtype, 1), b = random_matrix(n, dtype, 2);
  const DType out_dtype = dtype == DType::Float32 ? DType::Float32 : DType::BFloat16;
  const Tensor out = scratch(out_dtype, {n, n});
  const Product p{.a = a.data(), .b = b.data(), .out = out.data(), .rows = n, .inner = n, .columns = n, .dtype = dtype,
                  .out_dtype = out_dtype, .b_transposed = true};
  // The median after a while under load, as rows of a benchmark are timed: a cold device is faster than its power limit lets it stay.
  product(p);  // chooses the algorithm
  std::vector<float> ms;
  for (float spent = 0; spent < kPeakMs; spent += ms.back()) ms.push_back(milliseconds_of([&] { product(p); }));
  std::ranges::sort(ms.begin() + std::ssize(ms) / 4, ms.end());
  const float median = ms[(ms.size() / 4 + ms.size()) / 2];
  const auto side = static_cast<double>(n);
  return 2 * side * side * side / (1e-3 * static_cast<double>(median));
}

}  // namespace uniflow::cuda
