// Argument errors of gate_add_relu.
#pragma once

#include <functional>

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

// Of gate_add_relu_, beyond the above: what it writes must not be a residual still to be read. Both are dense.
inline void check_gate_add_relu_in_place(const Tensor& z, const OptionalTensor& residual) {
  if (!residual) return;
  const auto end = [](const Tensor& t) {
    return static_cast<const char*>(t.data_ptr()) + t.numel() * t.element_size();
  };
  const std::less<const void*> before;
  if (before(z.data_ptr(), end(*residual)) && before(residual->data_ptr(), end(z))) {
    fail("gate_add_relu_: residual shares memory with z, which is written; pass a residual with memory of its own");
  }
}

}  // namespace resnet_fused
