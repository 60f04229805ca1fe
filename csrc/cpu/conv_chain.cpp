// conv_chain: the convolutions of conv_norm_add_relu, one after another.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../checks/conv_chain.h"
#include "../conv_chain.h"
#include "alloc.h"
#include "conv_norm_add_relu.h"

namespace resnet_fused::cpu {
namespace {

Tensor convolve_step(const ChainConvolution& c) {
  const auto& [stride, padding, dilation] = std::tie(c.step.stride, c.step.padding, c.step.dilation);
  check_conv_norm_add_relu(c.op, c.x, c.weight, stride, padding, dilation);
  const ConvShape s = shape_of_conv(c.x, c.weight, stride, padding, dilation);
  const Tensor out =
      c.target({s.N, s.K, s.P, s.Q}, [&] { return empty_images(s.N, s.K, s.P, s.Q, c.x.scalar_type()); });
  const OptionalTensor* b = c.behind;
  check_behind_conv(c.op, out, b[0], b[1], b[2], b[3], b[4], c.residual);
  const BehindConv behind{b[0], b[1], b[2], b[3], b[4], c.eps, c.step.relu};
  convolve(out, c.x, c.weight, s, behind, c.residual ? &*c.residual : nullptr);
  return out;
}

Tensor conv_chain(const Tensor& x, const OptionalTensor& residual, std::vector<OptionalTensor> tensors,
                  std::vector<int64_t> steps, std::vector<double> eps) {
  return run_chain(x, residual, tensors, steps, eps, convolve_step);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { m.impl("conv_chain", TORCH_BOX(&conv_chain)); }

}  // namespace resnet_fused::cpu
