// The launch of conv_norm_add_relu, for all ops that have it.
#pragma once

#include "conv_geometry.h"

namespace resnet_fused::cuda {

// What follows the convolution but the residual, as the op has it.
struct BehindConv {
  const OptionalTensor &bias, &mean, &var, &gamma, &beta;
  double eps;
  bool relu;
};

inline RunningNorm norm_of(const BehindConv& b) {
  return {pointer<float>(b.bias),  pointer<float>(b.mean), pointer<float>(b.var),
          pointer<float>(b.gamma), pointer<float>(b.beta), static_cast<float>(b.eps)};
}

// Everything has been checked, and the device is guarded. `residual` may be `out`.
void convolve(const char* op, const Tensor& out, const Tensor& x, const Tensor& weight, const ConvGeometry& geometry,
              const BehindConv& behind, const OptionalTensor& residual);

}  // namespace resnet_fused::cuda
