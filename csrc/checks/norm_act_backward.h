// Argument errors of norm_act_backward.
#pragma once

#include "norm_act.h"

namespace resnet_fused {

inline void check_norm_act_backward(const Tensor& grad_out, const Tensor& z, const Tensor& mean, const Tensor& scale,
                                    const Tensor& shift, int64_t act) {
  const char* op = "norm_act_backward";
  check_data(op, "grad_out", grad_out);
  check_like(op, "z", z, "grad_out", grad_out);
  check_vector(op, "mean", mean, z);
  check_vector(op, "scale", scale, z);
  check_vector(op, "shift", shift, z);
  check_act(op, act);
}

}  // namespace resnet_fused
