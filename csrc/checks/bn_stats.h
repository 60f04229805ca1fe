// Argument errors of bn_stats.
#pragma once

#include "common.h"

namespace resnet_fused {

inline void check_bn_stats(const Tensor& z) { check_data("bn_stats", "z", z); }

}  // namespace resnet_fused
