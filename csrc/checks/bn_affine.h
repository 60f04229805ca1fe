// Argument errors of bn_affine.
#pragma once

#include "vectors.h"

namespace resnet_fused {

inline void check_bn_affine(const Tensor& mean, const Tensor& m2, const OptionalTensor& gamma,
                            const OptionalTensor& beta) {
  check_vectors("bn_affine", mean,
                {{"m2", &m2}, {"gamma", gamma ? &*gamma : nullptr}, {"beta", beta ? &*beta : nullptr}});
}

}  // namespace resnet_fused
