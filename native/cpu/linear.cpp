#include "native/cpu/linear.h"

#include <omp.h>

#include <mutex>
#include <oneapi/dnnl/dnnl.hpp>
#include <unordered_map>
#include <vector>

#include "native/cpu/kernels.h"

namespace uniflow::cpu {
namespace {

using dnnl::memory;
using tag = memory::format_tag;

dnnl::engine& engine() {
  static auto* e = new dnnl::engine(dnnl::engine::kind::cpu, 0);
  return *e;
}

memory::data_type dnnl_type(DType t) { return t == DType::BFloat16 ? memory::data_type::bf16 : memory::data_type::f32; }

memory::desc matrix(int64_t rows, int64_t cols, DType t, tag layout = tag::ab) { return {{rows, cols}, dnnl_type(t), layout}; }

// oneDNN 3 dropped the operation descriptors and took the engine into the primitive descriptors.
dnnl::matmul::primitive_desc describe(const memory::desc& x, const memory::desc& w, const memory::desc* bias, const memory::desc& out,
                                      const dnnl::primitive_attr& attr) {
#if DNNL_VERSION_MAJOR >= 3
  return bias ? dnnl::matmul::primitive_desc(engine(), x, w, *bias, out, attr) : dnnl::matmul::primitive_desc(engine(), x, w, out, attr);
#else
  return bias ? dnnl::matmul::primitive_desc(dnnl::matmul::desc(x, w, *bias, out), attr, engine())
              : dnnl::matmul::primitive_desc(dnnl::matmul::desc(x, w, out), attr, engine());
#endif
}

struct DnnlPacking : Packing {
  int64_t out, in;
  DType compute;      // of the product, and of the weight unless:
  bool plain_bfloat16 = false;  // a plain bfloat16 weight on a machine whose products are float32
  memory::desc desc;  // [in, out], blocked
};

const DnnlPacking& dnnl_packing(const Packing& p) { return static_cast<const DnnlPacking&>(p); }

bool detect_bfloat16() {
  try {
    describe(matrix(64, 64, DType::BFloat16), matrix(64, 64, DType::BFloat16, tag::any), nullptr, matrix(64, 64, DType::BFloat16), {});
    return true;
  } catch (const dnnl::error&) {
    return false;
  }
}

void append_activation(dnnl::post_ops& ops, Activation activation) {
  using algorithm = dnnl::algorithm;
  auto eltwise = [&](algorithm a, float alpha) {
#if DNNL_VERSION_MAJOR >= 3
    ops.append_eltwise(a, alpha, 0.0f);
#else
    ops.append_eltwise(1.0f, a, alpha, 0.0f);
#endif
  };
  switch (activation) {
    case Activation::None: break;
    case Activation::Gelu: eltwise(algorithm::eltwise_gelu_erf, 0); break;
    case Activation::GeluTanh: eltwise(algorithm::eltwise_gelu_tanh, 0); break;
    case Activation::QuickGelu: eltwise(algorithm::eltwise_swish, 1.702f); break;
    case Activation::Silu: eltwise(algorithm::eltwise_swish, 1.0f); break;
  }
}

/// What a primitive is built for; everything else is given when it runs.
struct Key {
  const void* packing;
  int64_t rows;
  DType x, out;
  Activation activation;
  bool bias, scale, residual;
  int64_t backward_out = 0, backward_in = 0;  // of the backward products, which have no packing
  bool weight_gradient = false;
  int threads = omp_get_max_threads();  // a primitive keeps the team that it was built for
  bool operator==(const Key&) const = default;
};

struct KeyHash {
  size_t operator()(const Key& k) const {
    size_t h = std::hash<const void*>()(k.packing);
    for (size_t v : {static_cast<size_t>(k.rows), static_cast<size_t>(k.x), static_cast<size_t>(k.out), static_cast<size_t>(k.activation),
                     size_t{k.bias}, size_t{k.scale}, size_t{k.residual}, static_cast<size_t>(k.backward_out), static_cast<size_t>(k.backward_in),
                     size_t{k.weight_gradient}, static_cast<size_t>(k.threads)})
      h = h * 1000003 + v;
    return h;
  }
};

dnnl::matmul build(const Key& k, const DnnlPacking& p) {
  dnnl::post_ops ops;
  append_activation(ops, k.activation);
  if (k.scale) ops.append_binary(dnnl::algorithm::binary_mul, matrix(1, p.out, DType::Float32));
  if (k.residual) ops.append_binary(dnnl::algorithm::binary_add, matrix(k.rows, p.out, k.out));
  dnnl::primitive_attr attr;
  attr.set_post_ops(ops);
  const memory::desc bias = matrix(1, p.out, DType::Float32);
  return dnnl::matmul(describe(matrix(k.rows, p.in, k.x), p.desc, k.bias ? &bias : nullptr, matrix(k.rows, p.out, k.out), attr));
}

/// Building a primitive takes about 0.1 ms even when oneDNN has the code cached; a step runs hundreds.
template <class Build>
dnnl::primitive cached(const Key& key, Build&& build) {
  constexpr size_t kLimit = 1024;
  static auto* cache = new std::unordered_map<Key, dnnl::primitive, KeyHash>;
  static auto* mutex = new std::mutex;
  std::lock_guard lock(*mutex);
  if (auto it = cache->find(key); it != cache->end()) return it->second;
  if (cache->size() >= kLimit) cache->clear();
  return cache->emplace(key, build()).first->second;
}

memory bind(const memory::desc& d, const void* data) { return memory(d, engine(), const_cast<void*>(data)); }

void execute(const dnnl::primitive& primitive, const std::unordered_map<int, memory>& args) {
  dnnl::stream stream(engine());
  primitive.execute(stream, args);
  stream.wait();
}

void run(const LinearArgs& a, const DnnlPacking& p) {
  const Key key{&p, a.rows, a.x_dtype, a.out_dtype, a.activation, a.bias != nullptr, a.scale != nullptr, a.residual != nullptr};
  const memory::desc row = matrix(1, p.out, DType::Float32), out = matrix(a.rows, p.out, a.out_dtype);
  std::unordered_map<int, memory> args{{DNNL_ARG_SRC, bind(matrix(a.rows, p.in, a.x_dtype), a.x)},
                                       {DNNL_ARG_WEIGHTS, bind(p.desc, a.weight)},
                                       {DNNL_ARG_DST, bind(out, a.out)}};
  if (a.bias) args.emplace(DNNL_ARG_BIAS, bind(row, a.bias));
  int op = a.activation == Activation::None ? 0 : 1;
  if (a.scale) args.emplace(DNNL_ARG_ATTR_MULTIPLE_POST_OP(op++) | DNNL_ARG_SRC_1, bind(row, a.scale));
  if (a.residual) args.emplace(DNNL_ARG_ATTR_MULTIPLE_POST_OP(op) | DNNL_ARG_SRC_1, bind(out, a.residual));
  execute(cached(key, [&] { return build(key, p); }), args);
}

/// d_out^T x and the column sums of d_out, by oneDNN's inner product: it takes both as they lie.
void weight_gradient(const LinearBackwardArgs& a) {
  const memory::desc x = matrix(a.rows, a.in, a.dtype), d = matrix(a.rows, a.out, a.dtype), w = matrix(a.out, a.in, DType::Float32);
  const memory::desc bias({a.out}, memory::data_type::f32, tag::a), hint = matrix(a.out, a.in, a.dtype);
  const Key key{nullptr, a.rows, a.dtype, DType::Float32, Activation::None, a.d_bias != nullptr, false, false, a.out, a.in, true};
  auto make = [&]() -> dnnl::primitive {
    using forward = dnnl::inner_product_forward;
    using backward = dnnl::inner_product_backward_weights;
    const auto training = dnnl::prop_kind::forward_training;
#if DNNL_VERSION_MAJOR >= 3
    const forward::primitive_desc fpd(engine(), training, x, hint, d);
    return backward(a.d_bias ? backward::primitive_desc(engine(), x, w, bias, d, fpd) : backward::primitive_desc(engine(), x, w, d, fpd));
#else
    const forward::primitive_desc fpd(forward::desc(training, x, hint, d), engine());
    return backward(backward::primitive_desc(a.d_bias ? backward::desc(x, w, bias, d) : backward::desc(x, w, d), engine(), fpd));
#endif
  };
  std::unordered_map<int, memory> args{
      {DNNL_ARG_SRC, bind(x, a.x)}, {DNNL_ARG_DIFF_DST, bind(d, a.d_out)}, {DNNL_ARG_DIFF_WEIGHTS, bind(w, a.d_weight)}};
  if (a.d_bias) args.emplace(DNNL_ARG_DIFF_BIAS, bind(bias, a.d_bias));
  execute(cached(key, make), args);
}

/// bfloat16 activations on a machine whose products are float32: converted in and out.
void run_converted(const LinearArgs& a, const DnnlPacking& p) {
  const Kernels& k = kernels();
  auto widen = [&](const void* x, int64_t n) {
    std::vector<float> v(static_cast<size_t>(n));
    k.cast(x, DType::BFloat16, v.data(), DType::Float32, n);
    return v;
  };
  LinearArgs wide = a;
  std::vector<float> x, residual, out, weight;
  std::shared_ptr<const Packing> plain;
  if (p.plain_bfloat16) {
    weight = widen(a.weight, p.out * p.in);
    plain = plain_packing(p.out, p.in, DType::Float32);
    wide.weight = weight.data();
  }
  if (a.x_dtype == DType::BFloat16) {
    x = widen(a.x, a.rows * p.in);
    wide.x = x.data();
    wide.x_dtype = DType::Float32;
  }
  if (a.out_dtype == DType::BFloat16) {
    if (a.residual) residual = widen(a.residual, a.rows * p.out), wide.residual = residual.data();
    out.resize(static_cast<size_t>(a.rows * p.out));
    wide.out = out.data();
    wide.out_dtype = DType::Float32;
  }
  run(wide, plain ? dnnl_packing(*plain) : p);
  if (!out.empty()) k.cast(out.data(), DType::Float32, a.out, DType::BFloat16, a.rows * p.out);
}

/// Copies between a plain [out, in] matrix and the packed one.
void reorder(const DnnlPacking& p, const void* plain, DType dtype, const void* packed, bool packing) {
  const memory::desc plain_desc = matrix(p.in, p.out, dtype, tag::ba);  // [out, in] in C order is its transpose in column order
  memory a(plain_desc, engine(), const_cast<void*>(plain)), b(p.desc, engine(), const_cast<void*>(packed));
  memory &from = packing ? a : b, &to = packing ? b : a;
  execute(dnnl::reorder(from, to), {{DNNL_ARG_FROM, from}, {DNNL_ARG_TO, to}});
}

}  // namespace

bool native_bfloat16() {
  static const bool native = detect_bfloat16();
  return native;
}

namespace {

/// Packings are interned: as few as there are shapes, alive for ever, so that their address can stand for them.
template <class Layout>
std::shared_ptr<const Packing> intern(int64_t out, int64_t in, DType dtype, const char* kind, Layout&& layout) {
  static auto* interned = new std::unordered_map<std::string, std::shared_ptr<const DnnlPacking>>;
  static auto* mutex = new std::mutex;
  std::lock_guard lock(*mutex);
  auto& slot = (*interned)[kind + std::to_string(out) + "x" + std::to_string(in) + name_of(dtype)];
  if (slot) return slot;
  auto p = std::make_shared<DnnlPacking>();
  p->out = out;
  p->in = in;
  p->compute = dtype == DType::BFloat16 && native_bfloat16() ? DType::BFloat16 : DType::Float32;
  p->desc = layout(p->compute);
  p->plain_bfloat16 = p->compute == DType::Float32 && p->desc == matrix(in, out, DType::BFloat16, tag::ba);
  return slot = p;
}

}  // namespace

std::shared_ptr<const Packing> linear_packing(int64_t out, int64_t in, DType dtype) {
  if (dtype == DType::Float8) throw Error(ErrorCode::Unsupported, "dtype", "float32 or bfloat16 on the CPU", "float8");
  return intern(out, in, dtype, "packed ", [&](DType compute) {
    // The layout is chosen for a typical number of rows, and kept for all: it depends on out and in only.
    constexpr int64_t kRows = 1024;
    return describe(matrix(kRows, in, compute), matrix(in, out, compute, tag::any), nullptr, matrix(kRows, out, compute), {}).weights_desc();
  });
}

std::shared_ptr<const Packing> plain_packing(int64_t out, int64_t in, DType dtype) {
  return intern(out, in, dtype, "plain ", [&](DType) { return matrix(in, out, dtype, tag::ba); });
}

int64_t packed_bytes(const Packing& packing) { return static_cast<int64_t>(dnnl_packing(packing).desc.get_size()); }

void pack(const Packing& packing, const void* plain, DType dtype, void* packed) {
  reorder(dnnl_packing(packing), plain, dtype, packed, true);
}

void unpack(const Packing& packing, const void* packed, void* plain, DType dtype) {
  reorder(dnnl_packing(packing), plain, dtype, packed, false);
}

namespace {

[[noreturn]] void rethrow(const dnnl::error& e, int64_t rows, int64_t out, int64_t in) {
  throw Error(e.status == dnnl_out_of_memory ? ErrorCode::OutOfMemory : ErrorCode::Internal,
              std::string("oneDNN: ") + e.what() + " for [" + std::to_string(rows) + ", " + std::to_string(in) + "] x [" +
                  std::to_string(out) + ", " + std::to_string(in) + "]");
}

}  // namespace

void linear(const LinearArgs& a) {
  const auto plain = a.packing ? nullptr : plain_packing(a.width, a.in, a.x_dtype);
  const DnnlPacking& p = dnnl_packing(plain ? *plain : *a.packing);
  try {
    const bool converts = p.compute == DType::Float32 && (a.x_dtype == DType::BFloat16 || a.out_dtype == DType::BFloat16);
    if (converts) run_converted(a, p);
    else run(a, p);
  } catch (const dnnl::error& e) {
    rethrow(e, a.rows, p.out, p.in);
  }
}

void linear_backward(const LinearBackwardArgs& a) {
  if (a.dtype == DType::BFloat16 && !native_bfloat16())
    throw Error(ErrorCode::Unsupported, "training in bfloat16 needs a processor with bfloat16 products: train in float32 here");
  try {
    if (a.d_x) {  // d_out [M, N] times the weight as it lies, [N, K]
      const Key key{nullptr, a.rows, a.dtype, a.dtype, Activation::None, false, false, false, a.out, a.in};
      const memory::desc d = matrix(a.rows, a.out, a.dtype), w = matrix(a.out, a.in, a.dtype), x = matrix(a.rows, a.in, a.dtype);
      execute(cached(key, [&] { return dnnl::matmul(describe(d, w, nullptr, x, {})); }),
              {{DNNL_ARG_SRC, bind(d, a.d_out)}, {DNNL_ARG_WEIGHTS, bind(w, a.weight)}, {DNNL_ARG_DST, bind(x, a.d_x)}});
    }
    if (a.d_weight) weight_gradient(a);
    else if (a.d_bias) kernels().column_sum(a.d_out, a.d_bias, a.dtype, a.rows, a.out);
  } catch (const dnnl::error& e) {
    rethrow(e, a.rows, a.out, a.in);
  }
}

std::string linear_backend() {
  const dnnl_version_t* v = dnnl_version();
  const DType dtype = native_bfloat16() ? DType::BFloat16 : DType::Float32;
  auto pd = describe(matrix(1024, 1024, dtype), matrix(1024, 1024, dtype, tag::any), nullptr, matrix(1024, 1024, dtype), {});
  return "oneDNN " + std::to_string(v->major) + "." + std::to_string(v->minor) + "." + std::to_string(v->patch) + ", " +
         pd.impl_info_str();
}

}  // namespace uniflow::cpu
