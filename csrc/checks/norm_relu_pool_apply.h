// Argument errors of norm_relu_pool_apply.
#pragma once

#include <vector>

#include "pooling.h"

namespace resnet_fused {

inline void check_norm_relu_pool_apply(const char* op, const Tensor& grad_out, const Tensor& index, const Tensor& z,
                                       const Tensor& a, const OptionalTensor& b, const OptionalTensor& d,
                                       const Tensor& scale, const Tensor& shift, const std::vector<int64_t>& kernel,
                                       const std::vector<int64_t>& stride, const std::vector<int64_t>& padding) {
  check_pooled_gradient(op, grad_out, index, z, kernel, stride, padding);
  check_vector(op, "a", a, z);
  check_pair(op, "b", b, "d", d, z);
  check_vector(op, "scale", scale, z);
  check_vector(op, "shift", shift, z);
}

}  // namespace resnet_fused
