// Argument errors of gram_norm.
#pragma once

#include "gram_join.h"

namespace resnet_fused {

inline void check_gram_norm(const Tensor& weight, const Tensor& gram, const Tensor& total, const Tensor& centre,
                            const Tensor& a) {
  check_gram_join("gram_norm", weight, gram, total, centre, a);
}

}  // namespace resnet_fused
