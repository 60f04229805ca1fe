// Argument errors of grouped_conv3x3_wgrad.
#pragma once

#include "grouped_conv3x3.h"

namespace resnet_fused {

inline void check_grouped_conv3x3_wgrad(const Tensor& grad, const Tensor& x, const Tensor& weight, int64_t stride) {
  const char* op = "grouped_conv3x3_wgrad";
  check_grouped(op, x, weight, stride);
  check_data(op, "grad", grad);
  check_device(op, "grad", grad, x);
  if (grad.scalar_type() != x.scalar_type()) fail(op, ": got ", grad.scalar_type(), " grad; pass Float");
  bool fits = grad.size(0) == x.size(0) && grad.size(1) == x.size(1);
  for (int64_t i = 2; fits && i < 4; ++i) fits = x.size(i) > 0 && grad.size(i) == (x.size(i) - 1) / stride + 1;
  if (!fits) {
    fail(op, ": a 3x3 convolution of x ", shape_of(x), " with stride ", stride, " and padding 1 does not give ",
         shape_of(grad), "; pass the gradient at its output");
  }
}

}  // namespace resnet_fused
