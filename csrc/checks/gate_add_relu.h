// Argument errors of gate_add_relu.
#pragma once

#include "common.h"

namespace resnet_fused {

// A contiguous matrix with a number for each sample and channel of the activations.
inline void check_by_sample(const char* op, const char* name, const Tensor& t, const Tensor& data) {
  check_device(op, name, t, data);
  if (t.dim() != 2 || t.size(0) != data.size(0) || t.size(1) != data.size(1)) {
    fail(op, ": ", name, " has shape ", shape_of(t), " but the activations have ", data.size(0), " samples of ",
         data.size(1), " channels; pass a [", data.size(0), ", ", data.size(1), "] matrix");
  }
  if (t.scalar_type() != stat_dtype(data.scalar_type())) {
    fail(op, ": ", name, " is ", t.scalar_type(), "; pass ", stat_dtype(data.scalar_type()), " for ",
         data.scalar_type(), " activations");
  }
  if (!t.is_contiguous()) fail(op, ": ", name, " is not contiguous; pass ", name, ".contiguous()");
}

inline void check_gate_add_relu(const Tensor& z, const Tensor& factor, const OptionalTensor& term,
                                const OptionalTensor& residual) {
  const char* op = "gate_add_relu";
  check_data(op, "z", z);
  check_by_sample(op, "factor", factor, z);
  if (term) check_by_sample(op, "term", *term, z);
  if (residual) check_like(op, "residual", *residual, "z", z);
}

}  // namespace resnet_fused
