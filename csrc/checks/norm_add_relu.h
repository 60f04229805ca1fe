// Argument errors of norm_add_relu.
#pragma once

#include "common.h"

namespace resnet_fused {

inline void check_norm_add_relu(const Tensor& z, const Tensor& scale, const Tensor& shift,
                                const OptionalTensor& residual, const OptionalTensor& residual_scale,
                                const OptionalTensor& residual_shift, const OptionalTensor& sample_factor) {
  const char* op = "norm_add_relu";
  check_data(op, "z", z);
  check_vector(op, "scale", scale, z);
  check_vector(op, "shift", shift, z);
  if (residual) check_like(op, "residual", *residual, "z", z);
  if (residual_scale && !residual) fail(op, ": got residual_scale without residual; pass both");
  check_pair(op, "residual_scale", residual_scale, "residual_shift", residual_shift, z);
  check_factor(op, sample_factor, z);
}

}  // namespace resnet_fused
