// Argument errors of dense_conv3x3.
#pragma once

#include "dense.h"

namespace resnet_fused {

inline void check_dense_conv3x3(const Tensor& z, const Tensor& weight, const Tensor& scale, const Tensor& shift,
                                const Tensor& out) {
  const char* op = "dense_conv3x3";
  check_slice(op, "z", z);
  check_layout(op, "z", z);
  check_slice(op, "out", out);
  check_pixels(op, "out", out, out.size(1), "z", z);
  check_apart(op, "z", z, out);
  check_weight3x3(op, weight, out.size(1), z.size(1), z);
  check_size(op, "scale", scale, z.size(1), z);
  check_size(op, "shift", shift, z.size(1), z);
}

}  // namespace resnet_fused
