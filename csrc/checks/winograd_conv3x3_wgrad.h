// Argument errors of winograd_conv3x3_wgrad.
#pragma once

#include <vector>

#include "common.h"

namespace resnet_fused {

inline void check_winograd_conv3x3_wgrad(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                         const std::vector<int64_t>& padding) {
  const char* op = "winograd_conv3x3_wgrad";
  check_data(op, "grad", grad);
  check_data(op, "x", x);
  check_device(op, "x", x, grad);
  for (const Tensor& t : {grad, x, weight}) {
    if (t.scalar_type() != ScalarType::Float) fail(op, ": got a tensor of ", t.scalar_type(), "; pass Float");
  }
  if (padding.size() != 2) fail(op, ": padding has ", padding.size(), " entries; pass two");
  if (padding[0] < 0 || padding[1] < 0) {
    fail(op, ": got padding [", padding[0], ", ", padding[1], "]; pass two numbers, 0 or more");
  }
  bool fits = weight.dim() == 4 && weight.size(0) == grad.size(1) && weight.size(1) == x.size(1) &&
              grad.size(0) == x.size(0) && weight.size(2) == 3 && weight.size(3) == 3;
  for (int64_t i = 0; fits && i < 2; ++i) fits = grad.size(2 + i) == x.size(2 + i) + 2 * padding[i] - 2;
  if (!fits) {
    fail(op, ": a 3x3 convolution of x ", shape_of(x), " with weight ", shape_of(weight), " does not give ",
         shape_of(grad), "; pass the gradient at its output, and a weight of 3x3 without groups");
  }
}

}  // namespace resnet_fused
