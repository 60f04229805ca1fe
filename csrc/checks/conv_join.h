// Argument errors of conv_join.
#pragma once

#include "conv1x1_gradient.h"
#include "conv_norm_add_relu.h"

namespace resnet_fused {

inline void check_conv_join(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift,
                            const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                            const std::vector<int64_t>& dilation, const OptionalTensor& sample_factor) {
  const char* op = "conv_join";
  check_conv_norm_add_relu(op, x, weight, stride, padding, dilation, true);
  check_channels(op, "scale", scale, weight.size(0), x);
  check_channels(op, "shift", shift, weight.size(0), x);
  check_factor(op, sample_factor, x);
}

}  // namespace resnet_fused
