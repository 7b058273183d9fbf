#include "native/ops/elementwise.h"

#include "native/ops/check.h"

namespace uniflow::ops {

Tensor cast(const SessionRef& session, const Tensor& x, DType dtype) {
  if (!x || x.packing()) reject("x", "a plain tensor", describe(x));
  check_floating(x, "x");
  if (x.dtype() == dtype) return x;
  Tensor out(x.device(), dtype, x.shape());
  check_floating(out, "dtype");
  enqueue(session, {"cast", {x}, {out}, [=](const Run& run) {
    run.kernels.cast(x.data(), x.dtype(), out.data(), dtype, x.size());
  }});
  return out;
}

Tensor swiglu(const SessionRef& session, const Tensor& x) {
  if (!x || x.packing() || x.rank() < 1 || x.dim(-1) % 2) reject("x", "a tensor [..., 2n]", describe(x));
  check_floating(x, "x");
  Shape shape = x.shape();
  shape.back() /= 2;
  Tensor out(x.device(), x.dtype(), shape);
  enqueue(session, {"swiglu", {x}, {out}, [=](const Run& run) {
    if (out.size() == 0) return;
    run.kernels.swiglu(x.data(), out.data(), x.dtype(), out.size() / out.dim(-1), out.dim(-1));
  }});
  return out;
}

void check_finite(const SessionRef& session, const Tensor& x, const std::string& name) {
  if (!x || x.packing()) reject(name, "a plain tensor", describe(x));
  check_dtype(x, name.c_str(), {DType::Float32});
  enqueue(session, {"checkFinite", {x}, {x}, [=](const Run& run) {
    const int64_t bad = run.kernels.count_non_finite(x.data<float>(), x.size());
    if (bad) reject(name, "finite values", std::to_string(bad) + " of " + std::to_string(x.size()) + " NaN or infinite");
  }});
}

Tensor slice_tokens(const SessionRef& session, const Tensor& x, int64_t begin, int64_t end) {
  check_shape(x, "x", {-1, -1, -1});
  if (begin < 0 || end < begin || end > x.dim(1))
    reject("tokens", "a range within [0, " + std::to_string(x.dim(1)) + "]", "[" + std::to_string(begin) + ", " + std::to_string(end) + ")");
  if (begin == 0 && end == x.dim(1)) return x;
  Tensor out(x.device(), x.dtype(), {x.dim(0), end - begin, x.dim(2)});
  enqueue(session, {"sliceTokens", {x}, {out}, [=](const Run& run) {
    const int64_t row = x.dim(2) * size_of(x.dtype()), bytes = (end - begin) * row;
    run.kernels.copy_rows(out.data(), bytes, x.data<std::byte>() + begin * row, x.dim(1) * row, bytes, x.dim(0));
  }});
  return out;
}

Tensor pad_tokens(const SessionRef& session, const Tensor& x, int64_t begin, int64_t total) {
  check_shape(x, "x", {-1, -1, -1});
  if (begin < 0 || begin + x.dim(1) > total) reject("tokens", "a range within [0, " + std::to_string(total) + "]", std::to_string(begin));
  Tensor out(x.device(), x.dtype(), {x.dim(0), total, x.dim(2)});
  enqueue(session, {"padTokens", {x}, {out}, [=](const Run& run) {
    const int64_t row = x.dim(2) * size_of(x.dtype()), bytes = x.dim(1) * row, image = total * row, behind = (begin + x.dim(1)) * row;
    std::byte* to = out.data<std::byte>();
    run.kernels.copy_rows(to, image, nullptr, 0, begin * row, x.dim(0));
    run.kernels.copy_rows(to + begin * row, image, x.data(), bytes, bytes, x.dim(0));
    run.kernels.copy_rows(to + behind, image, nullptr, 0, image - behind, x.dim(0));
  }});
  return out;
}

}  // namespace uniflow::ops
