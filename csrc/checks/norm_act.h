// Argument errors of norm_act.
#pragma once

#include "common.h"

namespace resnet_fused {

inline void check_act(const char* op, int64_t act) {
  if (act < 0 || act > 5) fail(op, ": act is ", act, "; pass 0 to 5, see resnet_fused/ops/activation.py");
}

inline void check_norm_act(const Tensor& z, const Tensor& scale, const Tensor& shift, int64_t act) {
  const char* op = "norm_act";
  check_data(op, "z", z);
  check_vector(op, "scale", scale, z);
  check_vector(op, "shift", shift, z);
  check_act(op, act);
}

}  // namespace resnet_fused
