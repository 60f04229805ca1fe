// Batch norm's per-channel arithmetic, forward: a loop over a few hundred channels instead of twenty operations on
// them.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../checks/bn_affine.h"
#include "affine.h"

namespace resnet_fused::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bn_affine(const Tensor& mean, const Tensor& m2,
                                                             const OptionalTensor& gamma, const OptionalTensor& beta,
                                                             const Tensor& z, double eps) {
  check_bn_affine(mean, m2, gamma, beta);
  const Affine found = affine(mean, m2, gamma, beta, z, eps);
  return {found.var, found.rstd, found.scale, found.shift, found.centre};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { m.impl("bn_affine", TORCH_BOX(&bn_affine)); }

}  // namespace resnet_fused::cpu
