/// What evaluation counts over many images: the nearest of a row of scores, and the moments of features.
#pragma once

#include "native/ops/linear.h"

namespace uniflow::ops {

/// The k largest of each row, in descending order; of equal ones the lowest index comes first, NaN comes last.
/// Bytes: the scores read once.
struct TopK {
  Tensor values;   // [M, k] float32
  Tensor indices;  // [M, k] int32
};

/// scores [M, N] float32, k from 1 to N.
TopK top_k(const SessionRef& session, const Tensor& scores, int64_t k);

/// Mean and unbiased covariance (divisor N - 1) of the columns: centred and summed in float64, the same whatever the number of
/// threads. FLOPs: N*D*(D+1) in float64. Memory besides: D*D float64.
struct Covariance {
  Tensor mean;        // [D] float32
  Tensor covariance;  // [D, D] float32
};

/// x [N, D] float32, at least two rows.
Covariance covariance(const SessionRef& session, const Tensor& x);

}  // namespace uniflow::ops
