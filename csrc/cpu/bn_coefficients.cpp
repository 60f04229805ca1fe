// Batch norm's per-channel arithmetic, backward: one loop instead of ten operations on a few hundred channels.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../checks/bn_coefficients.h"
#include "coefficients.h"

namespace resnet_fused::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor> bn_coefficients(const Tensor& sum_g, const Tensor& sum_gz, const Tensor& mean,
                                                   const Tensor& rstd, const Tensor& scale, const Tensor& z) {
  check_bn_coefficients(sum_g, sum_gz, mean, rstd, scale);
  return coefficients(sum_g, sum_gz, mean, rstd, scale, z);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { m.impl("bn_coefficients", TORCH_BOX(&bn_coefficients)); }

}  // namespace resnet_fused::cpu
