/// The whole encoder of the official size, and one of its blocks, from the kernels that lib/encoder/transformer.ts queues: what a user of
/// encode() can expect of a GPU, without Node and without images.
#include "native/test/gpu/gpu.h"

namespace uniflow::test {
namespace {

constexpr DType kHalf = DType::BFloat16, kFloat = DType::Float32;

struct Vit {
  int64_t width, heads, hidden, tokens, layers;
  double flops(int64_t images) const {  // of a block: products and attention
    const auto rows = static_cast<double>(images * tokens), d = static_cast<double>(width);
    return rows * (8 * d * d + 4 * d * static_cast<double>(hidden) + 4 * static_cast<double>(tokens) * d);
  }
};

struct Epilogue {
  const float* scale = nullptr;
  const void* residual = nullptr;
  Activation activation = Activation::None;
};

struct Layer {
  Layer(int64_t out, int64_t in)
      : out(out), in(in), packing(gpu().linear_packing(out, in, kHalf)), weight(DType::UInt8, gpu().packed_bytes(*packing)), bias(DeviceArray::normal(kFloat, out)) {
    const DeviceArray plain = DeviceArray::normal(kHalf, out * in, 1 / std::sqrt(static_cast<float>(in)));
    gpu().pack(*packing, plain.data(), kHalf, weight.data());
  }

  /// x [rows, in] -> to [rows, out]
  void operator()(const void* x, void* to, int64_t rows, const Epilogue& o = {}) const {
    gpu().linear({.x = x, .weight = weight.data(), .packing = packing.get(), .out = to, .rows = rows, .in = in, .width = out, .x_dtype = kHalf,
                  .out_dtype = kHalf, .bias = bias.as<float>(), .scale = o.scale, .residual = o.residual, .activation = o.activation});
  }

  int64_t out, in;
  std::shared_ptr<const Packing> packing;
  DeviceArray weight, bias;
};

/// Activations of `images` images, used by all blocks.
struct Workspace {
  Workspace(const Vit& s, int64_t images)
      : images(images),
        rows(images * s.tokens),
        h(DeviceArray::normal(kHalf, rows * s.width)),
        other(kHalf, rows * s.width),
        u(kHalf, rows * s.width),
        qkv(kHalf, rows * 3 * s.width),
        mlp(kHalf, rows * s.hidden) {}
  int64_t images, rows;
  DeviceArray h, other, u, qkv, mlp;
};

struct Block {
  explicit Block(const Vit& s)
      : s(s), qkv(3 * s.width, s.width), proj(s.width, s.width), fc1(s.hidden, s.width), fc2(s.width, s.hidden), weight(DeviceArray::normal(kFloat, s.width)),
        bias(DeviceArray::normal(kFloat, s.width)), scale(DeviceArray::normal(kFloat, s.width, 0.1f)) {}

  void norm(const DeviceArray& x, const Workspace& w) const {
    gpu().norm({.x = x.data(), .out = w.u.data(), .x_dtype = kHalf, .out_dtype = kHalf, .rows = w.rows, .width = s.width, .x_stride = s.width,
                .out_stride = s.width, .rms = false, .eps = 1e-6f, .weight = weight.as<float>(), .bias = bias.as<float>()});
  }
  void operator()(const Workspace& w) const {
    norm(w.h, w);
    qkv(w.u.data(), w.qkv.data(), w.rows);
    gpu().attention({.qkv = w.qkv.data(), .out = w.u.data(), .dtype = kHalf, .batch = w.images, .seq = s.tokens, .heads = s.heads,
                     .head_dim = s.width / s.heads, .scale = 1 / std::sqrt(static_cast<float>(s.width / s.heads))});
    proj(w.u.data(), w.other.data(), w.rows, {.scale = scale.as<float>(), .residual = w.h.data()});
    norm(w.other, w);
    fc1(w.u.data(), w.mlp.data(), w.rows, {.activation = Activation::Gelu});
    fc2(w.mlp.data(), w.h.data(), w.rows, {.scale = scale.as<float>(), .residual = w.other.data()});
  }

  Vit s;
  Layer qkv, proj, fc1, fc2;
  DeviceArray weight, bias, scale;
};

}  // namespace

void bench_encoder() {
  const Vit s = emulated() ? Vit{32, 2, 64, 5, 2} : Vit{1024, 16, 4096, 1025, 24};
  std::vector<Block> blocks;
  for (int64_t i = 0; i < s.layers; ++i) blocks.emplace_back(s);
  for (const int64_t images : {1, 4, 32}) {
    if (emulated() && images > 1) break;
    const Workspace w(s, images);
    const std::string size = std::to_string(images) + "x" + std::to_string(s.tokens) + "x" + std::to_string(s.width);
    time_gpu("block " + size, {.flops = s.flops(images), .bytes = 0}, kHalf, [&] { blocks[0](w); });
    time_gpu("encode " + size, {.flops = static_cast<double>(s.layers) * s.flops(images), .bytes = 0}, kHalf, [&] {
      for (const Block& block : blocks) block(w);
    });
  }
}

}  // namespace uniflow::test
