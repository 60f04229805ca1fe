// What follows a convolution in conv_norm_add_relu, on the sums.
#pragma once

#include <cmath>
#include <cstdint>

#include "simd.h"

namespace resnet_fused::cpu {

// Absent vectors and the absent residual are null.
template <class A>
struct Behind {
  const A *bias, *mean, *var, *gamma, *beta, *residual;
  A eps;
  bool relu;

  // Scale and shift of channel k.
  RESNET_FUSED_INLINE void affine(int64_t k, A& scale, A& shift) const {
    scale = A(1), shift = bias ? bias[k] : A(0);
    if (!mean) return;
    scale = (gamma ? gamma[k] : A(1)) / std::sqrt(var[k] + eps);
    shift = (shift - mean[k]) * scale + (beta ? beta[k] : A(0));
  }
};

}  // namespace resnet_fused::cpu
