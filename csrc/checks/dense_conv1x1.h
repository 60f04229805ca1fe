// Argument errors of dense_conv1x1.
#pragma once

#include "dense.h"

namespace resnet_fused {

inline void check_dense_conv1x1(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift) {
  const char* op = "dense_conv1x1";
  check_slice(op, "x", x);
  check_weight(op, "weight", weight, -1, x.size(1), x);
  check_size(op, "scale", scale, x.size(1), x);
  check_size(op, "shift", shift, x.size(1), x);
}

}  // namespace resnet_fused
