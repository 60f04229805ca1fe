// Argument errors of gram_grad.
#pragma once

#include "gram_join.h"

namespace resnet_fused {

inline void check_gram_grad(const Tensor& weight, const Tensor& product, const Tensor& gram, const Tensor& total,
                            const Tensor& centre, const Tensor& sum_g, const Tensor& scale, const Tensor& rstd,
                            const Tensor& a) {
  const char* op = "gram_grad";
  check_gram_join(op, weight, gram, total, centre, a);
  const int64_t K = weight.size(0);
  check_statistics(op, "product", product, {K, weight.size(1)}, weight);
  check_statistics(op, "sum_g", sum_g, {K}, weight);
  check_statistics(op, "scale", scale, {K}, weight);
  check_statistics(op, "rstd", rstd, {K}, weight);
}

}  // namespace resnet_fused
