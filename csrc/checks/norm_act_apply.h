// Argument errors of norm_act_apply.
#pragma once

#include "norm_act.h"

namespace resnet_fused {

inline void check_norm_act_apply(const Tensor& g, const Tensor& z, const Tensor& a, const OptionalTensor& b,
                                 const OptionalTensor& d, const Tensor& scale, const Tensor& shift, int64_t act) {
  const char* op = "norm_act_apply";
  check_data(op, "g", g);
  check_like(op, "z", z, "g", g);
  check_vector(op, "a", a, g);
  check_pair(op, "b", b, "d", d, g);
  check_vector(op, "scale", scale, g);
  check_vector(op, "shift", shift, g);
  check_act(op, act);
}

}  // namespace resnet_fused
