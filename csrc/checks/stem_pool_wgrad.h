// Argument errors of stem_pool_wgrad.
#pragma once

#include <vector>

#include "norm_relu_pool_apply.h"
#include "stem_conv_wgrad.h"

namespace resnet_fused {

inline void check_stem_pool_wgrad(const Tensor& grad_out, const Tensor& index, const Tensor& z, const Tensor& a,
                                  const OptionalTensor& b, const OptionalTensor& d, const Tensor& scale,
                                  const Tensor& shift, const Tensor& x, const Tensor& weight,
                                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                  const std::vector<int64_t>& pool_kernel, const std::vector<int64_t>& pool_stride,
                                  const std::vector<int64_t>& pool_padding) {
  const char* op = "stem_pool_wgrad";
  check_norm_relu_pool_apply(op, grad_out, index, z, a, b, d, scale, shift, pool_kernel, pool_stride, pool_padding);
  check_stem_conv_wgrad(op, z, x, weight, stride, padding);
}

}  // namespace resnet_fused
