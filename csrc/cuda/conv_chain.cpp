// conv_chain for CUDA tensors: the launches of conv_norm_add_relu, one after another; the meaning is in
// resnet_fused/ops/conv_chain.py.

#include "../conv_chain.h"

#include <tuple>

#include "../checks/conv_chain.h"
#include "convolve.h"

namespace resnet_fused::cuda {
namespace {

Tensor convolve_step(const ChainConvolution& c) {
  const auto& [stride, padding, dilation] = std::tie(c.step.stride, c.step.padding, c.step.dilation);
  check_conv_norm_add_relu(c.op, c.x, c.weight, stride, padding, dilation, true);
  const ConvGeometry g = geometry_of(c.op, c.x, c.weight, stride, padding, dilation);
  const Tensor out = c.target({g.n, g.k, g.p, g.q}, [&] { return empty_images(c.x, g.n, g.k, g.p, g.q); });
  const OptionalTensor* b = c.behind;
  check_behind_conv(c.op, out, b[0], b[1], b[2], b[3], b[4], c.residual);
  convolve(c.op, out, c.x, c.weight, g, {b[0], b[1], b[2], b[3], b[4], c.eps, c.step.relu}, c.residual);
  return out;
}

Tensor conv_chain(const Tensor& x, const OptionalTensor& residual, std::vector<OptionalTensor> tensors,
                  std::vector<int64_t> steps, std::vector<double> eps) {
  const DeviceGuard guard(x.get_device_index());
  return run_chain(x, residual, tensors, steps, eps, convolve_step);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, m) { m.impl("conv_chain", TORCH_BOX(&conv_chain)); }

}  // namespace resnet_fused::cuda
