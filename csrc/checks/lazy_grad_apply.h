// Argument errors of lazy_grad_apply.
#pragma once

#include "common.h"

namespace resnet_fused {

inline void check_lazy_grad_apply(const Tensor& g, const OptionalTensor& z, const Tensor& a, const OptionalTensor& b,
                                  const OptionalTensor& d, const OptionalTensor& scale, const OptionalTensor& shift,
                                  const OptionalTensor& sample_factor) {
  const char* op = "lazy_grad_apply";
  check_data(op, "g", g);
  if (z) check_like(op, "z", *z, "g", g);
  check_vector(op, "a", a, g);
  check_pair(op, "b", b, "d", d, g);
  check_pair(op, "scale", scale, "shift", shift, g);
  if (!z && (b || scale)) fail(op, ": got ", b ? "b" : "scale", " without z; pass z too");
  check_factor(op, sample_factor, g);
}

}  // namespace resnet_fused
