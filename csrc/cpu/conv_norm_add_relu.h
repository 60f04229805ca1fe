// The convolution of conv_norm_add_relu, for all ops that have it.
#pragma once

#include <vector>

#include "../checks/conv_norm_add_relu.h"
#include "conv_few_pixels.h"

namespace resnet_fused::cpu {

// Everything behind the convolution but the residual, as tensors.
struct BehindConv {
  const OptionalTensor &bias, &mean, &var, &gamma, &beta;
  double eps;
  bool relu;
};

// Of arguments that have been checked.
ConvShape shape_of_conv(const Tensor& x, const Tensor& weight, const std::vector<int64_t>& stride,
                        const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation);

// Everything has been checked. `residual`: null, or a tensor, which may be `out`.
void convolve(const Tensor& out, const Tensor& x, const Tensor& weight, const ConvShape& shape,
              const BehindConv& behind, const Tensor* residual);

}  // namespace resnet_fused::cpu
