// Argument errors of norm_relu_avg_pool_apply.
#pragma once

#include <vector>

#include "average_pooling.h"

namespace resnet_fused {

inline void check_norm_relu_avg_pool_apply(const Tensor& grad_out, const Tensor& x, const Tensor& a,
                                           const OptionalTensor& b, const OptionalTensor& d, const Tensor& scale,
                                           const Tensor& shift, const std::vector<int64_t>& kernel,
                                           const std::vector<int64_t>& stride) {
  const char* op = "norm_relu_avg_pool_apply";
  check_averaged_gradient(op, grad_out, x, kernel, stride);
  check_vector(op, "a", a, x);
  check_pair(op, "b", b, "d", d, x);
  check_vector(op, "scale", scale, x);
  check_vector(op, "shift", shift, x);
}

}  // namespace resnet_fused
