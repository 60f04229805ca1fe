// What the ops on a Gram join's small matrices check alike.
#pragma once

#include <vector>

#include "common.h"

namespace resnet_fused {

// A contiguous tensor of `shape` in the dtype of statistics beside `weight`.
inline void check_statistics(const char* op, const char* name, const Tensor& t, const std::vector<int64_t>& shape,
                             const Tensor& weight) {
  check_device(op, name, t, weight);
  bool fits = t.dim() == static_cast<int64_t>(shape.size());
  for (int64_t i = 0; fits && i < t.dim(); ++i) fits = t.size(i) == shape[i];
  if (!fits) {
    std::ostringstream expected;
    for (size_t i = 0; i < shape.size(); ++i) expected << (i ? ", " : "") << shape[i];
    fail(op, ": ", name, " has shape ", shape_of(t), " but weight has ", shape_of(weight), "; pass ", name,
         " of shape [", expected.str(), "]");
  }
  const ScalarType dtype = stat_dtype(weight.scalar_type());
  if (t.scalar_type() != dtype) {
    fail(op, ": ", name, " is ", t.scalar_type(), "; pass ", dtype, " for a ", weight.scalar_type(), " weight");
  }
  if (!t.is_contiguous()) fail(op, ": ", name, " is not contiguous; pass ", name, ".contiguous()");
}

// A 1x1 weight, what the op `gram` made of its input and was given for it, and a tensor of as many pixels.
inline void check_gram_join(const char* op, const Tensor& weight, const Tensor& gram, const Tensor& total,
                            const Tensor& centre, const Tensor& a) {
  if (weight.dim() != 4 || weight.size(2) != 1 || weight.size(3) != 1) {
    fail(op, ": weight has shape ", shape_of(weight), "; pass a [K, C, 1, 1] weight");
  }
  check_data(op, "weight", weight);
  const int64_t C = weight.size(1);
  check_statistics(op, "gram", gram, {C, C}, weight);
  check_statistics(op, "total", total, {C}, weight);
  check_statistics(op, "centre", centre, {C}, weight);
  if (a.dim() != 4) {
    fail(op, ": a has shape ", shape_of(a), "; pass a [N, C, H, W] tensor of as many pixels as gram was made from");
  }
}

}  // namespace resnet_fused
