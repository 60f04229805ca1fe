// Argument errors of dense_leave.
#pragma once

#include "dense.h"

namespace resnet_fused {

inline void check_dense_leave(const Tensor& grad, const Tensor& x, const Tensor& b, const Tensor& d) {
  const char* op = "dense_leave";
  check_slice(op, "grad", grad);
  check_pixels(op, "x", x, grad.size(1), "grad", grad);
  check_size(op, "b", b, grad.size(1), grad);
  check_size(op, "d", d, grad.size(1), grad);
}

}  // namespace resnet_fused
