/// Linear layers: out = residual + scale * act(x W^T + bias), and their gradients, as products of gemm.h.
///
/// A packed weight [out, in] is the right side of its product, as panels of its transpose. A plain one (in training) is packed on the fly,
/// because it changes with every step. In the backward pass, d_x = d_out W uses W untransposed, and d_weight = d_out^T x uses the columns
/// of d_out as rows. Sums are float32; bfloat16 is rounded once, when an output is written.
///
/// Roofline bound: FLOPs over the FMA peak from about 16 rows on; the bytes of the weight below that.
#include <array>
#include <cstddef>

#include "native/core/tensor.h"
#include "native/cpu/activation.h"
#include "native/cpu/gemm.h"
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

}  // namespace

std::shared_ptr<const Packing> linear_packing(int64_t out, int64_t in, DType dtype) {
  if (dtype == DType::Float8) throw Error(ErrorCode::Unsupported, "dtype", "float32 or bfloat16 on the CPU", "float8");
  return std::make_shared<LinearPacking>(out, in, dtype);
}

int64_t packed_bytes(const Packing& packing) {
  const LinearPacking& p = of(packing);
  if (p.dtype == DType::Float32) return panels<FloatUnits<float>>(p.out, p.in, nullptr).size() * 4;
  return panels<Bfloat16Units>(p.out, p.in, nullptr).size() * static_cast<int64_t>(sizeof(Bfloat16Units::Panel));
}

void pack(const Packing& packing, const void* plain, DType dtype, void* packed) {
  const LinearPacking& p = of(packing);
  if (p.dtype == DType::Float32) return dtype == DType::Float32 ? pack_weight<FloatUnits<float>>(p, plain, packed) : pack_weight<FloatUnits<bf16>>(p, plain, packed);
  if (dtype == DType::BFloat16) return pack_weight<Bfloat16Units>(p, plain, packed);
  const Tensor rounded = scratch_bytes(p.out * p.in * size_of(DType::BFloat16));
  cast(plain, DType::Float32, rounded.data(), DType::BFloat16, p.out * p.in);
  pack_weight<Bfloat16Units>(p, rounded.data(), packed);
}

void unpack(const Packing& packing, const void* packed, void* plain, DType dtype) {
  const LinearPacking& p = of(packing);
  if (p.dtype == DType::Float32) unpack_weight<FloatUnits<float>>(p, packed, plain, dtype);
  else unpack_weight<Bfloat16Units>(p, packed, plain, dtype);
}

void linear(const LinearArgs& a) {
  const DType weight = a.packing ? of(*a.packing).dtype : a.x_dtype;
  if (weight == DType::BFloat16) forward<Bfloat16Units>(a);
  else if (a.x_dtype == DType::BFloat16) forward<FloatUnits<bf16>>(a);
  else forward<FloatUnits<float>>(a);
}

void linear_backward(const LinearBackwardArgs& a) {
  if (a.dtype == DType::BFloat16) backward<Bfloat16Units>(a);
  else backward<FloatUnits<float>>(a);
}

}  // namespace uniflow::cpu::UNIFLOW_ISA
