// Argument errors of gram.
#pragma once

#include <vector>

#include "common.h"

namespace resnet_fused {

inline void check_gram(const Tensor& a, const Tensor& centre, const OptionalTensor& scale, const OptionalTensor& shift,
                       const std::vector<int64_t>& stride) {
  check_data("gram", "a", a);
  check_vector("gram", "centre", centre, a);
  check_pair("gram", "scale", scale, "shift", shift, a);
  if (stride.size() != 2) fail("gram: stride has ", stride.size(), " entries; pass two");
  if (stride[0] < 1 || stride[1] < 1) {
    fail("gram: stride is [", stride[0], ", ", stride[1], "]; pass two positive numbers");
  }
}

}  // namespace resnet_fused
