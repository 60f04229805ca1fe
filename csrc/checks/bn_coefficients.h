// Argument errors of bn_coefficients.
#pragma once

#include "vectors.h"

namespace resnet_fused {

inline void check_bn_coefficients(const Tensor& sum_g, const Tensor& sum_gz, const Tensor& mean, const Tensor& rstd,
                                  const Tensor& scale) {
  check_vectors("bn_coefficients", sum_g, {{"sum_gz", &sum_gz}, {"mean", &mean}, {"rstd", &rstd}, {"scale", &scale}});
}

}  // namespace resnet_fused
