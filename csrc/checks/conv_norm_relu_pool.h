// Argument errors of conv_norm_relu_pool.
#pragma once

#include <vector>

#include "parameters.h"
#include "pooling.h"
#include "stem.h"

namespace resnet_fused {

// `z`: stands for the convolution's output, of which it has shape and dtype.
inline void check_conv_norm_relu_pool(const Tensor& z, const OptionalTensor& bias, const OptionalTensor& mean,
                                      const OptionalTensor& var, const OptionalTensor& gamma,
                                      const OptionalTensor& beta) {
  const char* op = "conv_norm_relu_pool";
  check_pair(op, "mean", mean, "var", var, z);
  if (bias) check_vector(op, "bias", *bias, z);
  if (gamma) check_vector(op, "gamma", *gamma, z);
  if (beta) check_vector(op, "beta", *beta, z);
  if ((gamma || beta) && !mean) fail(op, ": got gamma or beta without mean; pass mean and var");
}

}  // namespace resnet_fused
