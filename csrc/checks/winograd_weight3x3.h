// Argument errors of winograd_weight3x3.
#pragma once

#include "common.h"

namespace resnet_fused {

// A dense Float vector for each output channel of a 3x3 weight.
inline void check_winograd_vector(const char* op, const char* name, const OptionalTensor& t, const Tensor& weight) {
  if (!t) return;
  check_device(op, name, *t, weight);
  if (t->dim() != 1 || t->size(0) != weight.size(0) || t->scalar_type() != ScalarType::Float || !t->is_contiguous()) {
    fail(op, ": ", name, " is ", t->scalar_type(), " of shape ", shape_of(*t), "; pass a contiguous Float [",
         weight.size(0), "] vector");
  }
}

inline void check_winograd_weight3x3(const Tensor& weight, const OptionalTensor& scale, int64_t outputs,
                                     int64_t stride) {
  const char* op = "winograd_weight3x3";
  if (weight.scalar_type() != ScalarType::Float) fail(op, ": got ", weight.scalar_type(), " weight; pass Float");
  if (weight.dim() != 4 || weight.size(2) != 3 || weight.size(3) != 3) {
    fail(op, ": weight has shape ", shape_of(weight), "; pass [K, C, 3, 3]");
  }
  if (outputs != 2 && outputs != 4) fail(op, ": outputs is ", outputs, "; pass 2 or 4");
  if (stride != 1 && stride != 2) fail(op, ": stride is ", stride, "; pass 1 or 2");
  if (stride == 2 && outputs != 2) fail(op, ": outputs is ", outputs, " with a stride of 2; pass 2");
  check_winograd_vector(op, "scale", scale, weight);
}

}  // namespace resnet_fused
