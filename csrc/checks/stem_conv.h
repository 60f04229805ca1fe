// Argument errors of stem_conv.
#pragma once

#include <vector>

#include "stem.h"

namespace resnet_fused {

inline void check_stem_conv(const Tensor& x, const Tensor& weight, const std::vector<int64_t>& stride,
                            const std::vector<int64_t>& padding) {
  check_stem("stem_conv", x, weight, stride, padding);
}

}  // namespace resnet_fused
