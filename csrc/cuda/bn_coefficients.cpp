// bn_coefficients for CUDA tensors; the meaning is in resnet_fused/ops/bn_coefficients.py, the kernel in kernels/.

#include "../checks/bn_coefficients.h"
#include "common.h"

namespace resnet_fused::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> bn_coefficients(const Tensor& sum_g, const Tensor& sum_gz, const Tensor& mean,
                                                   const Tensor& rstd, const Tensor& scale, const Tensor& z) {
  check_bn_coefficients(sum_g, sum_gz, mean, rstd, scale);
  check_float("bn_coefficients", "sum_g", sum_g);
  const DeviceGuard guard(sum_g.get_device_index());
  const auto vector = [&] { return empty_like(sum_g, {sum_g.numel()}, ScalarType::Float); };
  Tensor b = vector(), d = vector(), grad_gamma = vector();
  const BnCoefficientsParams params{z.size(0) * z.size(2) * z.size(3),
                                    sum_g.numel(),
                                    pointer<float>(sum_g),
                                    pointer<float>(sum_gz),
                                    pointer<float>(mean),
                                    pointer<float>(rstd),
                                    pointer<float>(scale),
                                    output<float>(b),
                                    output<float>(d),
                                    output<float>(grad_gamma)};
  launch_bn_coefficients(params, current_stream(sum_g));
  check_launch("bn_coefficients", sum_g);
  return {b, d, grad_gamma};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, m) { m.impl("bn_coefficients", TORCH_BOX(&bn_coefficients)); }

}  // namespace resnet_fused::cuda
