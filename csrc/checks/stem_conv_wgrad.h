// Argument errors of stem_conv_wgrad, and of what makes the gradient itself.
#pragma once

#include <vector>

#include "stem.h"

namespace resnet_fused {

inline void check_stem_conv_wgrad(const char* op, const Tensor& grad, const Tensor& x, const Tensor& weight,
                                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding) {
  check_stem(op, x, weight, stride, padding);
  check_data(op, "grad", grad);
  check_device(op, "grad", grad, x);
  if (grad.scalar_type() != x.scalar_type()) fail(op, ": got ", grad.scalar_type(), " grad; pass Float");
  bool fits = grad.size(0) == x.size(0) && grad.size(1) == weight.size(0);
  for (int64_t i = 2; fits && i < 4; ++i) {
    fits = grad.size(i) == (x.size(i) + 2 * padding[i - 2] - weight.size(i)) / stride[i - 2] + 1;
  }
  if (!fits) {
    fail(op, ": a convolution of x ", shape_of(x), " with weight ", shape_of(weight), " does not give ", shape_of(grad),
         "; pass the gradient at its output");
  }
}

}  // namespace resnet_fused
