// Argument errors of conv_values.
#pragma once

#include "conv_norm_add_relu.h"
#include "parameters.h"

namespace resnet_fused {

inline void check_conv_values(const Tensor& x, const Tensor& weight, const OptionalTensor& x_scale,
                              const OptionalTensor& x_shift, const std::vector<int64_t>& stride,
                              const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                              const OptionalTensor& gamma, const OptionalTensor& beta, std::optional<double> eps) {
  const char* op = "conv_values";
  check_conv_norm_add_relu(op, x, weight, stride, padding, dilation, true);
  check_pair(op, "x_scale", x_scale, "x_shift", x_shift, x);
  check_parameters(op, gamma, beta, eps, weight.size(0), x);
}

}  // namespace resnet_fused
