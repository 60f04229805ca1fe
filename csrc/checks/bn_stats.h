// Argument errors of bn_stats.
#pragma once

#include "parameters.h"

namespace resnet_fused {

inline void check_bn_stats(const Tensor& z, const OptionalTensor& gamma, const OptionalTensor& beta,
                           std::optional<double> eps) {
  check_data("bn_stats", "z", z);
  check_parameters("bn_stats", gamma, beta, eps, z.size(1), z);
}

}  // namespace resnet_fused
