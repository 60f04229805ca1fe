// conv1x1 for CUDA tensors; the meaning is in resnet_fused/ops/conv1x1.py. The kernel, in kernels/, takes other filters
// too, and is compiled with conv_values.

#include "../checks/conv1x1.h"
#include "convolve_values.h"

namespace resnet_fused::cuda {
namespace {

Convolved conv1x1(const Tensor& x, const Tensor& weight, const OptionalTensor& x_scale, const OptionalTensor& x_shift,
                  std::vector<int64_t> stride, bool emit_stats, const OptionalTensor& gamma, const OptionalTensor& beta,
                  std::optional<double> eps) {
  check_conv1x1(x, weight, x_scale, x_shift, stride, gamma, beta, eps, true);
  const ConvGeometry g = geometry_of("conv1x1", x, weight, stride, {0, 0}, {1, 1});
  return convolve_values("conv1x1", x, weight, x_scale, x_shift, g, emit_stats, gamma, beta, eps);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, m) { m.impl("conv1x1", TORCH_BOX(&conv1x1)); }

}  // namespace resnet_fused::cuda
