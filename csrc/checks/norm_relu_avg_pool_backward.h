// Argument errors of norm_relu_avg_pool_backward.
#pragma once

#include <vector>

#include "average_pooling.h"

namespace resnet_fused {

inline void check_norm_relu_avg_pool_backward(const Tensor& grad_out, const Tensor& x, const Tensor& mean,
                                              const Tensor& scale, const Tensor& shift,
                                              const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride) {
  const char* op = "norm_relu_avg_pool_backward";
  check_averaged_gradient(op, grad_out, x, kernel, stride);
  check_vector(op, "mean", mean, x);
  check_vector(op, "scale", scale, x);
  check_vector(op, "shift", shift, x);
}

}  // namespace resnet_fused
