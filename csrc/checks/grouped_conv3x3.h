// Argument errors of grouped_conv3x3.
#pragma once

#include <utility>
#include <vector>

#include "common.h"

namespace resnet_fused {

// A weight [C, width, 3, 3] of groups of `width` channels, as many outputs as inputs, and what it meets.
inline void check_grouped(const char* op, const Tensor& x, const Tensor& weight, int64_t stride) {
  check_data(op, "x", x);
  check_device(op, "weight", weight, x);
  if (x.scalar_type() != ScalarType::Float || weight.scalar_type() != ScalarType::Float) {
    fail(op, ": got ", x.scalar_type(), " x and ", weight.scalar_type(), " weight; pass Float");
  }
  if (stride != 1 && stride != 2) fail(op, ": stride is ", stride, "; pass 1 or 2");
  const int64_t C = x.size(1);
  if (weight.dim() != 4 || weight.size(0) != C || weight.size(2) != 3 || weight.size(3) != 3 || weight.size(1) < 1 ||
      C % weight.size(1)) {
    fail(op, ": weight has shape ", shape_of(weight), "; pass [", C, ", width, 3, 3] of groups of that width");
  }
}

// Returns rows and columns of what is made.
inline std::pair<int64_t, int64_t> check_grouped_conv3x3(const Tensor& x, const Tensor& weight, int64_t stride,
                                                         bool transposed, const std::vector<int64_t>& output_padding) {
  const char* op = "grouped_conv3x3";
  check_grouped(op, x, weight, stride);
  const int64_t most = transposed ? stride - 1 : 0;
  if (output_padding.size() != 2) fail(op, ": output_padding has ", output_padding.size(), " entries; pass two");
  for (const int64_t padding : output_padding) {
    if (padding < 0 || padding > most) fail(op, ": output_padding has ", padding, "; pass 0", most ? " or 1" : "");
  }
  const int64_t H = x.size(2), W = x.size(3);
  if (H < 1 || W < 1) fail(op, ": x of shape ", shape_of(x), " has no pixels; pass images");
  if (!transposed) return {(H - 1) / stride + 1, (W - 1) / stride + 1};
  return {(H - 1) * stride + 1 + output_padding[0], (W - 1) * stride + 1 + output_padding[1]};
}

}  // namespace resnet_fused
