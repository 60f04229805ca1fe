// Argument errors of norm_relu_pool.
#pragma once

#include <vector>

#include "pooling.h"

namespace resnet_fused {

inline void check_norm_relu_pool(const Tensor& z, const Tensor& scale, const Tensor& shift,
                                 const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                                 const std::vector<int64_t>& padding) {
  const char* op = "norm_relu_pool";
  check_data(op, "z", z);
  check_vector(op, "scale", scale, z);
  check_vector(op, "shift", shift, z);
  check_pooling(op, z, kernel, stride, padding);
}

}  // namespace resnet_fused
