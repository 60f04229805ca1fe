// Argument errors of dense_enter.
#pragma once

#include "dense.h"

namespace resnet_fused {

inline void check_dense_enter(const Tensor& x, const Tensor& out) {
  const char* op = "dense_enter";
  check_slice(op, "x", x);
  check_layout(op, "x", x);
  check_pixels(op, "out", out, x.size(1), "x", x);
  check_apart(op, "x", x, out);
}

}  // namespace resnet_fused
