#include "native/ops/statistics.h"

#include <limits>

#include "native/ops/check.h"

namespace uniflow::ops {

TopK top_k(const SessionRef& session, const Tensor& scores, int64_t k) {
  check_shape(scores, "scores", {-1, -1});
  check_dtype(scores, "scores", {DType::Float32});
  const int64_t rows = scores.dim(0), n = scores.dim(1);
  if (n > std::numeric_limits<int32_t>::max()) reject("scores", "fewer than 2^31 columns", std::to_string(n));
  if (k < 1 || k > n) reject("k", "1 to " + std::to_string(n) + ", the columns", std::to_string(k));
  TopK top{Tensor(scores.device(), DType::Float32, {rows, k}), Tensor(scores.device(), DType::Int32, {rows, k})};
  enqueue(session, {"topK", {scores}, {top.values, top.indices}, [=](const Run& run) {
    run.kernels.top_k(scores.data<float>(), rows, n, k, top.values.data<float>(), top.indices.data<int32_t>());
  }});
  return top;
}

Covariance covariance(const SessionRef& session, const Tensor& x) {
  check_shape(x, "x", {-1, -1});
  check_dtype(x, "x", {DType::Float32});
  const int64_t rows = x.dim(0), width = x.dim(1);
  if (rows < 2 || width < 1) reject("x", "at least two rows and a column", describe(x));
  Covariance out{Tensor(x.device(), DType::Float32, {width}), Tensor(x.device(), DType::Float32, {width, width})};
  enqueue(session, {"covariance", {x}, {out.mean, out.covariance}, [=](const Run& run) {
    run.kernels.covariance(x.data<float>(), rows, width, out.mean.data<float>(), out.covariance.data<float>());
  }});
  return out;
}

}  // namespace uniflow::ops
