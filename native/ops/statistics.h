/// Statistics for evaluation over many images: the k nearest by score, and the moments of features.
#pragma once

#include "native/ops/linear.h"

namespace uniflow::ops {

/// The k largest values of each row, in descending order. Equal values are ordered by index, NaN comes last.
/// Bytes: the scores read once.
struct TopK {
  Tensor values;   // [M, k] float32
  Tensor indices;  // [M, k] int32
};

/// scores [M, N] float32, k from 1 to N.
TopK top_k(const SessionRef& session, const Tensor& scores, int64_t k);

/// Mean and unbiased covariance (divisor N - 1) of the columns, centred and summed in float64, identical for any number of threads. FLOPs:
/// N*D*(D+1) in float64. Extra memory: D*D float64.
struct Covariance {
  Tensor mean;        // [D] float32
  Tensor covariance;  // [D, D] float32
};

/// x [N, D] float32, at least two rows.
Covariance covariance(const SessionRef& session, const Tensor& x);

}  // namespace uniflow::ops
