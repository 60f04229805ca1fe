// Argument errors of norm_relu_pool_backward.
#pragma once

#include <vector>

#include "pooling.h"

namespace resnet_fused {

inline void check_norm_relu_pool_backward(const Tensor& grad_out, const Tensor& index, const Tensor& z,
                                          const Tensor& mean, const Tensor& scale, const Tensor& shift,
                                          const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                                          const std::vector<int64_t>& padding) {
  const char* op = "norm_relu_pool_backward";
  check_pooled_gradient(op, grad_out, index, z, kernel, stride, padding);
  check_vector(op, "mean", mean, z);
  check_vector(op, "scale", scale, z);
  check_vector(op, "shift", shift, z);
}

}  // namespace resnet_fused
