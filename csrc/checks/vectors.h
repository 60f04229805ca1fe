// What the ops on a few channels check that have no activations beside their vectors, or only their shape.
#pragma once

#include <utility>
#include <vector>

#include "common.h"

namespace resnet_fused {

using NamedVector = std::pair<const char*, const Tensor*>;  // null: absent

// Contiguous vectors on a few channels, without activations beside them; `first` decides dtype, device and length.
inline void check_vectors(const char* op, const Tensor& first, const std::vector<NamedVector>& others) {
  const ScalarType dtype = first.scalar_type();
  if (first.dim() != 1 || !first.is_contiguous() || (dtype != ScalarType::Float && dtype != ScalarType::Double)) {
    fail(op, ": the first vector is ", dtype, " of shape ", shape_of(first), "; pass a contiguous [C] Float or Double");
  }
  for (const auto& [name, t] : others) {
    if (!t) continue;
    check_device(op, name, *t, first);
    if (t->dim() != 1 || t->size(0) != first.size(0) || t->scalar_type() != dtype || !t->is_contiguous()) {
      fail(op, ": ", name, " is ", t->scalar_type(), " of shape ", shape_of(*t), "; pass a contiguous [", first.size(0),
           "] ", dtype, " vector");
    }
  }
}

}  // namespace resnet_fused
