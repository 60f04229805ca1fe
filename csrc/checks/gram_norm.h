// Argument errors of gram_norm.
#pragma once

#include "gram_join.h"
#include "parameters.h"

namespace resnet_fused {

inline void check_gram_norm(const Tensor& weight, const Tensor& gram, const Tensor& total, const Tensor& centre,
                            const Tensor& a, const OptionalTensor& gamma, const OptionalTensor& beta,
                            std::optional<double> eps) {
  check_gram_join("gram_norm", weight, gram, total, centre, a);
  check_parameters("gram_norm", gamma, beta, eps, weight.size(0), weight);
}

}  // namespace resnet_fused
