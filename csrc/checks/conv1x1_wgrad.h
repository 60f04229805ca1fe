// Argument errors of conv1x1_wgrad, beyond those of its lazy gradient.
#pragma once

#include "conv1x1_gradient.h"

namespace resnet_fused {

// `rounds`: whether the kernel takes 16-bit data too.
inline void check_conv1x1_wgrad(const Tensor& g, const Tensor& x, const OptionalTensor& x_scale,
                                const OptionalTensor& x_shift, const std::vector<int64_t>& stride,
                                const std::vector<const OptionalTensor*>& join, bool rounds = false) {
  const char* op = "conv1x1_wgrad";
  check_input(op, x, x.size(1), stride, g, rounds);
  check_pair(op, "x_scale", x_scale, "x_shift", x_shift, x);
  for (const OptionalTensor* t : join) {
    if (t->has_value() != join[0]->has_value()) {
      fail(op, ": got some of join_weight, gram, total, centre, join_scale and join_rstd; pass all or none");
    }
  }
}

}  // namespace resnet_fused
