// Argument errors of conv_weight_grad.
#pragma once

#include <vector>

#include "common.h"

namespace resnet_fused {

inline void check_conv_weight_grad(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                   const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                   const std::vector<int64_t>& dilation) {
  const char* op = "conv_weight_grad";
  check_data(op, "grad", grad);
  check_data(op, "x", x);
  check_device(op, "x", x, grad);
  if (x.scalar_type() != grad.scalar_type() || weight.scalar_type() != grad.scalar_type()) {
    fail(op, ": got ", grad.scalar_type(), " grad, ", x.scalar_type(), " x and ", weight.scalar_type(),
         " weight; pass one dtype");
  }
  if (stride.size() != 2 || padding.size() != 2 || dilation.size() != 2) {
    fail(op, ": stride, padding and dilation have ", stride.size(), ", ", padding.size(), " and ", dilation.size(),
         " entries; pass two of each");
  }
  bool fits =
      weight.dim() == 4 && weight.size(0) == grad.size(1) && weight.size(1) == x.size(1) && grad.size(0) == x.size(0);
  for (int64_t i = 0; fits && i < 2; ++i) {
    const int64_t reach = dilation[i] * (weight.size(2 + i) - 1) + 1;
    fits = stride[i] > 0 && grad.size(2 + i) == (x.size(2 + i) + 2 * padding[i] - reach) / stride[i] + 1;
  }
  if (!fits) {
    fail(op, ": a convolution of x ", shape_of(x), " with weight ", shape_of(weight), " does not give ", shape_of(grad),
         "; pass the gradient at its output, and a weight without groups");
  }
}

}  // namespace resnet_fused
