// Argument errors of norm_relu_avg_pool.
#pragma once

#include <vector>

#include "average_pooling.h"

namespace resnet_fused {

inline void check_norm_relu_avg_pool(const Tensor& x, const Tensor& scale, const Tensor& shift,
                                     const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride) {
  const char* op = "norm_relu_avg_pool";
  check_averaged(op, x);
  check_vector(op, "scale", scale, x);
  check_vector(op, "shift", shift, x);
  check_average_pooling(op, x, kernel, stride);
}

}  // namespace resnet_fused
