// Argument errors of winograd_conv3x3.
#pragma once

#include "common.h"

namespace resnet_fused {

inline void check_winograd_conv3x3(const Tensor& x, const Tensor& weight, int64_t padding, bool transposed,
                                   int64_t outputs) {
  const char* op = "winograd_conv3x3";
  check_data(op, "x", x);
  check_device(op, "weight", weight, x);
  if (x.scalar_type() != ScalarType::Float || weight.scalar_type() != ScalarType::Float) {
    fail(op, ": got ", x.scalar_type(), " x and ", weight.scalar_type(), " weight; pass Float");
  }
  if (padding != 0 && padding != 1) fail(op, ": padding is ", padding, "; pass 0 or 1");
  if (outputs != 2 && outputs != 4) fail(op, ": outputs is ", outputs, "; pass 2 or 4");
  if (weight.dim() != 4 || weight.size(2) != 3 || weight.size(3) != 3 || weight.size(transposed ? 0 : 1) != x.size(1)) {
    const char *before = transposed ? "[" : "[K, ", *after = transposed ? ", C, 3, 3]" : ", 3, 3]";
    fail(op, ": weight has shape ", shape_of(weight), "; pass ", before, x.size(1), after);
  }
  const int64_t grows = transposed ? 2 - 2 * padding : 2 * padding - 2;
  if (x.size(2) + grows < 1 || x.size(3) + grows < 1) {
    fail(op, ": x of shape ", shape_of(x), " is smaller than the kernel; pass larger images, or padding=1");
  }
}

}  // namespace resnet_fused
