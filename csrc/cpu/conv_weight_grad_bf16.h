// conv_weight_grad in bfloat16, for machines whose instructions multiply it: has_bf16().
#pragma once

#include <vector>

#include "alloc.h"

namespace resnet_fused::cpu {

// Fills `out`, [K, C, R, S] at any strides; the arguments are conv_weight_grad's, checked.
void conv_weight_grad_bf16(const Tensor& grad, const Tensor& x, const Tensor& out, const std::vector<int64_t>& stride,
                           const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation);

}  // namespace resnet_fused::cpu
