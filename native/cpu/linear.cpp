/// Linear layers: out = residual + scale * act(x W^T + bias), and their gradients, as products of gemm.h.
///
/// A packed weight [out, in] is the right side of its product, as panels of its transpose. A plain one (in training) is packed on the fly,
/// because it changes with every step. In the backward pass, d_x = d_out W uses W untransposed, and d_weight = d_out^T x uses the columns
/// of d_out as rows. Sums are float32; bfloat16 is rounded once, when an output is written.
///
/// An int8 weight is multiplied with activations quantised row by row, in a pass of its own: two reads of x, the second from the cache, and a
/// write of half or a quarter of its bytes (int8.h).
///
/// Roofline bound: FLOPs over the FMA peak from about 16 rows on; the bytes of the weight below that.
#include <array>
#include <cstddef>

#include "native/core/tensor.h"
#include "native/cpu/activation.h"
#include "native/cpu/int8.h"
#include "native/cpu/kernels.h"

namespace uniflow::cpu::UNIFLOW_ISA {

void cast(const void*, DType, void*, DType, int64_t);
void column_sum(const void*, float*, DType, int64_t, int64_t);

namespace {

#if defined(__AVX512BF16__)
using Bfloat16Units = PairUnits;
#else
using Bfloat16Units = WidenedUnits;
#endif

struct LinearPacking : Packing {
  LinearPacking(int64_t out, int64_t in, DType dtype) : out(out), in(in), dtype(dtype) {}
  int64_t out, in;
  DType dtype;
};

const LinearPacking& of(const Packing& p) { return static_cast<const LinearPacking&>(p); }

/// A matrix [in, out] in panels.
template <class Units>
Panels<Units> panels(int64_t out, int64_t in, const void* data) {
  return {static_cast<const typename Units::Panel*>(data), ceil_div(in, Units::kPerUnit), ceil_div(out, kWidth)};
}

template <class Units>
Rows<typename Units::Element> rows_of(const void* data, int64_t count, int64_t width) {
  return {static_cast<const typename Units::Element*>(data), width, count, width};
}

Tensor scratch_bytes(int64_t bytes) {
  Tensor t(DType::UInt8, {bytes});
  t.buffer()->allocate();
  return t;
}

/// A right side that is valid as long as its product.
template <class Units>
class PackedOnce {
 public:
  PackedOnce(int64_t out, int64_t in)
      : memory_(scratch_bytes(panels<Units>(out, in, nullptr).size() * static_cast<int64_t>(sizeof(typename Units::Panel)))),
        right(panels<Units>(out, in, memory_.data())) {}

 private:
  Tensor memory_;

 public:
  Panels<Units> right;
};

// --- epilogues -----------------------------------------------------------------------------------------------------------

template <class Out, Activation kActivation>
void finish_tile(const LinearArgs& a, const float* tile, int64_t stride, int64_t first, int64_t rows, int64_t column) {
  const int64_t columns = std::min(stride, a.width - column);
  for (int64_t r = 0; r < rows; ++r, tile += stride) {
    const int64_t row = (first + r) * a.width + column;
    Out* const out = static_cast<Out*>(a.out) + row;
    const Out* const residual = a.residual ? static_cast<const Out*>(a.residual) + row : nullptr;
    for_lanes(columns, [&](int64_t i, int lanes) {
      vf v = load(tile + i);
      if (a.bias) v += load_lanes(a.bias + column + i, lanes);
      v = activate(kActivation, v);
      if (a.scale) v *= load_lanes(a.scale + column + i, lanes);
      if (residual) v += load_lanes(residual + i, lanes);
      store_lanes(out + i, v, lanes);
    });
  }
}

using FinishTile = void (*)(const LinearArgs&, const float*, int64_t, int64_t, int64_t, int64_t);

template <class Out>
FinishTile finish_for(Activation activation) {
  switch (activation) {
    case Activation::None: return finish_tile<Out, Activation::None>;
    case Activation::Gelu: return finish_tile<Out, Activation::Gelu>;
    case Activation::GeluTanh: return finish_tile<Out, Activation::GeluTanh>;
    case Activation::QuickGelu: return finish_tile<Out, Activation::QuickGelu>;
    case Activation::Silu: return finish_tile<Out, Activation::Silu>;
  }
  return nullptr;
}

/// Writes tiles of sums as the output of a layer.
struct LinearEpilogue {
  explicit LinearEpilogue(const LinearArgs& args)
      : args(args), finish(args.out_dtype == DType::BFloat16 ? finish_for<bf16>(args.activation) : finish_for<float>(args.activation)) {}
  void operator()(const float* tile, int64_t stride, int64_t first, int64_t rows, int64_t column) const {
    finish(args, tile, stride, first, rows, column);
  }

  const LinearArgs& args;
  FinishTile finish;
};

/// Arguments that store the sums unchanged: [*, width] in `dtype`.
LinearArgs plain_output(void* out, DType dtype, int64_t width) {
  return {.x = nullptr, .weight = nullptr, .packing = nullptr, .out = out, .rows = 0, .in = 0, .width = width, .x_dtype = dtype, .out_dtype = dtype};
}

// --- products --------------------------------------------------------------------------------------------------------------

template <class Units>
void forward(const LinearArgs& a) {
  const RowsLeft<Units> left{rows_of<Units>(a.x, a.rows, a.in)};
  if (a.packing) return gemm<Units>(left, panels<Units>(a.width, a.in, a.weight), LinearEpilogue(a));
  const PackedOnce<Units> weight(a.width, a.in);
  pack_right_transposed(rows_of<Units>(a.weight, a.width, a.in), weight.right);
  gemm<Units>(left, weight.right, LinearEpilogue(a));
}

/// out = left right, with the rows of `right` untransposed.
template <class Units, class Left>
void multiply_by_rows(const Left& left, const Rows<typename Units::Element>& right, void* out, DType dtype) {
  const PackedOnce<Units> packed(right.width, right.count);
  pack_right_rows(right, packed.right);
  const LinearArgs output = plain_output(out, dtype, right.width);
  gemm<Units>(left, packed.right, LinearEpilogue(output));
}

template <class T>
void forward_int8(const LinearArgs& a) {
  const Tensor values = scratch_bytes(a.rows * a.in), scales = scratch_bytes(a.rows * size_of(DType::Float32));
  quantize_rows(Rows<T>{static_cast<const T*>(a.x), a.in, a.rows, a.in}, values.data<int8_t>(), scales.data<float>());
  const Int8Weight weight(a.width, a.in, a.weight);
  const LinearEpilogue finish(a);
  const RowsLeft<Int8Units> left{rows_of<Int8Units>(values.data(), a.rows, a.in)};
  gemm<Int8Units>(left, weight.panels, Int8Epilogue<LinearEpilogue>{finish, weight, scales.data<float>()});
}

template <class Units>
void backward(const LinearBackwardArgs& a) {
  const auto x = rows_of<Units>(a.x, a.rows, a.in), d_out = rows_of<Units>(a.d_out, a.rows, a.out), weight = rows_of<Units>(a.weight, a.out, a.in);
  if (a.d_x) multiply_by_rows<Units>(RowsLeft<Units>{d_out}, weight, a.d_x, a.dtype);
  if (a.d_weight) multiply_by_rows<Units>(ColumnsLeft<Units>{d_out}, x, a.d_weight, DType::Float32);
  if (a.d_bias) column_sum(a.d_out, a.d_bias, a.dtype, a.rows, a.out);
}

template <class Units>
void pack_weight(const LinearPacking& p, const void* plain, void* packed) {
  pack_right_transposed(rows_of<Units>(plain, p.out, p.in), panels<Units>(p.out, p.in, packed));
}

template <class T>
void pack_int8_weight(const LinearPacking& p, const void* plain, void* packed) {
  const Int8Weight to(p.out, p.in, packed);
  const Tensor values = scratch_bytes(p.out * p.in);
  quantize_rows(Rows<T>{static_cast<const T*>(plain), p.in, p.out, p.in}, values.data<int8_t>(), to.scales);
  pack_int8(rows_of<Int8Units>(values.data(), p.out, p.in), to);
}

template <class Units, class Out>
void unpack_weight(const LinearPacking& p, const void* packed, Out* plain) {
  using Stored = typename Units::Stored;
  const Panels<Units> from = panels<Units>(p.out, p.in, packed);
  parallel_for(from.count(), [&](int64_t i) {
    const PanelRange panel = from[i];
    const int64_t columns = panel.vectors * kWidth, first = panel.first * kWidth;
    const auto* values = reinterpret_cast<const Stored*>(from.at(panel, 0));
    for (int64_t c = 0; c < std::min(columns, p.out - first); ++c)
      for (int64_t k = 0; k < p.in; ++k) {
        const Stored v = values[(k / Units::kPerUnit * columns + c) * Units::kPerUnit + k % Units::kPerUnit];
        if constexpr (std::is_same_v<Out, Stored>) plain[(first + c) * p.in + k] = v;
        else if constexpr (std::is_same_v<Out, bf16>) plain[(first + c) * p.in + k] = to_bf16(v);
        else plain[(first + c) * p.in + k] = to_float(v);
      }
  });
}

template <class Units>
void unpack_weight(const LinearPacking& p, const void* packed, void* plain, DType dtype) {
  if (dtype == DType::BFloat16) unpack_weight<Units>(p, packed, static_cast<bf16*>(plain));
  else unpack_weight<Units>(p, packed, static_cast<float*>(plain));
}

/// As int8, or as floats: int8 times scale.
void unpack_int8_weight(const LinearPacking& p, const void* packed, void* plain, DType dtype) {
  if (dtype == DType::Int8) return unpack_weight<Int8Units>(p, packed, static_cast<int8_t*>(plain));
  const Tensor values = scratch_bytes(p.out * p.in);
  unpack_weight<Int8Units>(p, packed, values.data<int8_t>());
  const Int8Weight weight(p.out, p.in, packed);
  parallel_for(p.out, [&](int64_t r) {
    for (int64_t i = r * p.in; i < (r + 1) * p.in; ++i) {
      const float v = static_cast<float>(values.data<int8_t>()[i]) * weight.scales[r];
      if (dtype == DType::BFloat16) static_cast<bf16*>(plain)[i] = to_bf16(v);
      else static_cast<float*>(plain)[i] = v;
    }
  });
}

}  // namespace

std::shared_ptr<const Packing> linear_packing(int64_t out, int64_t in, DType dtype) {
  if (dtype == DType::Int8 && in > kInt8Steps)
    throw Error(ErrorCode::Unsupported, "weight", "at most " + std::to_string(kInt8Steps) + " inputs for int8", std::to_string(in));
  if (dtype == DType::Float8) throw Error(ErrorCode::Unsupported, "dtype", "float32, bfloat16 or int8 on the CPU", "float8");
  return std::make_shared<LinearPacking>(out, in, dtype);
}

int64_t packed_bytes(const Packing& packing) {
  const LinearPacking& p = of(packing);
  if (p.dtype == DType::Int8) return Int8Weight(p.out, p.in, nullptr).bytes();
  if (p.dtype == DType::Float32) return panels<FloatUnits<float>>(p.out, p.in, nullptr).size() * 4;
  return panels<Bfloat16Units>(p.out, p.in, nullptr).size() * static_cast<int64_t>(sizeof(Bfloat16Units::Panel));
}

void pack(const Packing& packing, const void* plain, DType dtype, void* packed) {
  const LinearPacking& p = of(packing);
  if (p.dtype == DType::Int8) return dtype == DType::Float32 ? pack_int8_weight<float>(p, plain, packed) : pack_int8_weight<bf16>(p, plain, packed);
  if (p.dtype == DType::Float32) return dtype == DType::Float32 ? pack_weight<FloatUnits<float>>(p, plain, packed) : pack_weight<FloatUnits<bf16>>(p, plain, packed);
  if (dtype == DType::BFloat16) return pack_weight<Bfloat16Units>(p, plain, packed);
  const Tensor rounded = scratch_bytes(p.out * p.in * size_of(DType::BFloat16));
  cast(plain, DType::Float32, rounded.data(), DType::BFloat16, p.out * p.in);
  pack_weight<Bfloat16Units>(p, rounded.data(), packed);
}

void unpack(const Packing& packing, const void* packed, void* plain, DType dtype) {
  const LinearPacking& p = of(packing);
  if (p.dtype == DType::Int8) unpack_int8_weight(p, packed, plain, dtype);
  else if (p.dtype == DType::Float32) unpack_weight<FloatUnits<float>>(p, packed, plain, dtype);
  else unpack_weight<Bfloat16Units>(p, packed, plain, dtype);
}

void linear(const LinearArgs& a) {
  const DType weight = a.packing ? of(*a.packing).dtype : a.x_dtype;
  if (weight == DType::Int8) a.x_dtype == DType::BFloat16 ? forward_int8<bf16>(a) : forward_int8<float>(a);
  else if (weight == DType::BFloat16) forward<Bfloat16Units>(a);
  else if (a.x_dtype == DType::BFloat16) forward<FloatUnits<bf16>>(a);
  else forward<FloatUnits<float>>(a);
}

void linear_backward(const LinearBackwardArgs& a) {
  if (a.dtype == DType::BFloat16) backward<Bfloat16Units>(a);
  else backward<FloatUnits<float>>(a);
}

}  // namespace uniflow::cpu::UNIFLOW_ISA
