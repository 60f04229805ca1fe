// bn_affine for CUDA tensors; the meaning is in resnet_fused/ops/bn_affine.py, the kernel in kernels/.

#include "../checks/bn_affine.h"
#include "statistics.h"

namespace resnet_fused::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bn_affine(const Tensor& mean, const Tensor& m2,
                                                             const OptionalTensor& gamma, const OptionalTensor& beta,
                                                             const Tensor& z, double eps) {
  check_bn_affine(mean, m2, gamma, beta);
  check_float("bn_affine", "mean", mean);
  const DeviceGuard guard(mean.get_device_index());
  const AffineOutputs found(mean, mean.numel());
  const BnAffineParams params{z.size(0) * z.size(2) * z.size(3), mean.numel(), pointer<float>(mean), pointer<float>(m2),
                              found.params(gamma, beta, eps)};
  launch_bn_affine(params, current_stream(mean));
  check_launch("bn_affine", mean);
  return {found.var, found.rstd, found.scale, found.shift, found.centre};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, m) { m.impl("bn_affine", TORCH_BOX(&bn_affine)); }

}  // namespace resnet_fused::cuda
