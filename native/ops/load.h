/// Parameters, read from a checkpoint or drawn at random.
#pragma once

#include "native/core/safetensors.h"
#include "native/ops/linear.h"

namespace uniflow::ops {

/// Consecutive rows of a parameter: a tensor of a file, or (if file is empty) `rows` rows of zeros, for a bias that a family omits.
struct ParameterPart {
  std::shared_ptr<SafetensorsFile> file;
  std::string name;
  int64_t rows = 0;
};

/// Concatenates the parts along their first dimension, converts F32, F16, BF16 or I8 to `dtype`, and gives the result the shape `shape`. An I8
/// tensor is multiplied row by row with the F32 tensor `<name>_scale`.
/// `packed`: in the layout of linear(). The file's pages are released once read, so the weights are never held twice.
Tensor load_parameter(const SessionRef& session, const std::vector<ParameterPart>& parts, const Shape& shape, DType dtype, bool packed);

/// Normal(0, std) truncated at two standard deviations; element i is a function of (seed, stream, i).
Tensor random_parameter(const SessionRef& session, const Shape& shape, DType dtype, bool packed, uint64_t seed, uint32_t stream, float std);

/// All elements equal.
Tensor constant_parameter(const SessionRef& session, const Shape& shape, float value);

/// A plain copy of a parameter as `dtype`, outside the pool: the working copy of training.
Tensor copy_parameter(const SessionRef& session, const Tensor& parameter, DType dtype);

/// uint8 [bytes]: the values in C order as `dtype`, as a checkpoint stores them; Int8 only of an int8 weight.
Tensor parameter_bytes(const SessionRef& session, const Tensor& parameter, DType dtype);

/// The scales [out] float32 of an int8 weight's rows.
Tensor parameter_scales(const SessionRef& session, const Tensor& weight);

}  // namespace uniflow::ops
