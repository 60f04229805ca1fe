// Argument errors of lazy_grad_apply.
#pragma once

#include <functional>

#include "norm_add_relu_backward.h"

namespace resnet_fused {

inline void check_lazy_grad_apply(const Tensor& g, const OptionalTensor& z, const OptionalTensor& a,
                                  const OptionalTensor& b, const OptionalTensor& d, const OptionalTensor& scale,
                                  const OptionalTensor& shift, const OptionalTensor& sample_factor,
                                  const OptionalTensor& residual, const OptionalTensor& mask) {
  const char* op = "lazy_grad_apply";
  check_data(op, "g", g);
  if (z) check_like(op, "z", *z, "g", g);
  if (a) check_vector(op, "a", *a, g);
  check_pair(op, "b", b, "d", d, g);
  check_pair(op, "scale", scale, "shift", shift, g);
  if (!z && (b || scale)) fail(op, ": got ", b ? "b" : "scale", " without z; pass z too");
  check_factor(op, sample_factor, g);
  if (residual) check_like(op, "residual", *residual, "g", g);
  if (!mask) return;
  if (mask->scalar_type() != ScalarType::Byte) fail(op, ": mask is ", mask->scalar_type(), "; pass packed bits, Byte");
  check_mask(op, *mask, g);
  if (scale) fail(op, ": got a mask and scale and shift, which say the same; pass either");
}

// Of lazy_grad_apply_, beyond the above: what it writes must not be a residual still to be read. Both are dense.
inline void check_lazy_grad_apply_in_place(const Tensor& g, const OptionalTensor& residual) {
  if (!residual) return;
  const auto end = [](const Tensor& t) {
    return static_cast<const char*>(t.data_ptr()) + t.numel() * t.element_size();
  };
  const std::less<const void*> before;
  if (before(g.data_ptr(), end(*residual)) && before(residual->data_ptr(), end(g))) {
    fail("lazy_grad_apply_: residual shares memory with g, which is written; pass a residual with memory of its own");
  }
}

}  // namespace resnet_fused
