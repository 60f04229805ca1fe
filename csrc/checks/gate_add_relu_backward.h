// Argument errors of gate_add_relu_backward.
#pragma once

#include "common.h"

namespace resnet_fused {

inline void check_gate_add_relu_backward(const Tensor& grad_out, const Tensor& z, const OptionalTensor& out) {
  const char* op = "gate_add_relu_backward";
  check_data(op, "grad_out", grad_out);
  check_like(op, "z", z, "grad_out", grad_out);
  if (out) check_like(op, "out", *out, "grad_out", grad_out);
}

}  // namespace resnet_fused
