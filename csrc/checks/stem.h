// What the ops of convolutions of few channels check alike.
#pragma once

#include <vector>

#include "common.h"

namespace resnet_fused {

// That x, a float32 image, and a weight without groups make a convolution without dilation.
inline void check_stem(const char* op, const Tensor& x, const Tensor& weight, const std::vector<int64_t>& stride,
                       const std::vector<int64_t>& padding) {
  check_data(op, "x", x);
  check_device(op, "weight", weight, x);
  if (x.scalar_type() != ScalarType::Float || weight.scalar_type() != ScalarType::Float) {
    fail(op, ": got ", x.scalar_type(), " x and ", weight.scalar_type(), " weight; pass Float");
  }
  if (stride.size() != 2 || padding.size() != 2) {
    fail(op, ": stride and padding have ", stride.size(), " and ", padding.size(), " entries; pass two of each");
  }
  bool fits = weight.dim() == 4 && weight.size(1) == x.size(1);
  for (int64_t i = 0; fits && i < 2; ++i) {
    const int64_t room = x.size(2 + i) + 2 * padding[i] - weight.size(2 + i);
    fits = weight.size(2 + i) > 0 && stride[i] > 0 && padding[i] >= 0 && room >= 0;
  }
  if (!fits) {
    fail(op, ": weight ", shape_of(weight), " does not fit x ", shape_of(x),
         "; pass a [K, C, R, S] weight without groups that lies within the padded image");
  }
}

}  // namespace resnet_fused
