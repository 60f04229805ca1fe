// conv_chain for CUDA tensors: the launches of conv_norm_add_relu, one after another, and for a sum with its projection
// that of conv1x1_join; the meaning is in resnet_fused/ops/conv_chain.py.

#include "../conv_chain.h"

#include <tuple>

#include "../checks/conv_chain.h"
#include "convolve.h"

namespace resnet_fused::cuda {
namespace {

ConvGeometry checked_geometry(const ChainConvolution& c) {
  const auto& [stride, padding, dilation] = std::tie(c.step.stride, c.step.padding, c.step.dilation);
  check_conv_norm_add_relu(c.op, c.x, c.weight, stride, padding, dilation, true);
  return geometry_of(c.op, c.x, c.weight, stride, padding, dilation);
}

BehindConv behind(const ChainConvolution& c) {
  const OptionalTensor* b = c.behind;
  return {b[0], b[1], b[2], b[3], b[4], c.eps, c.step.relu};
}

// A sum and the projection that it adds, in one launch.
Tensor join_step(const ChainConvolution& c) {
  const ChainConvolution& second = *c.projection;
  const ConvGeometry g2 = checked_geometry(second), g = checked_geometry(c);
  if (g2.n != g.n || g2.k != g.k || g2.p != g.p || g2.q != g.q) {
    fail(c.op, ": residual has shape [", g2.n, ", ", g2.k, ", ", g2.p, ", ", g2.q, "] but the result has [", g.n, ", ",
         g.k, ", ", g.p, ", ", g.q, "]; pass a projection to that shape");
  }
  const Tensor out = empty_images(c.x, g.n, g.k, g.p, g.q);
  for (const ChainConvolution* each : {&second, &c}) {
    const OptionalTensor* b = each->behind;
    check_behind_conv(each->op, out, b[0], b[1], b[2], b[3], b[4], each->residual);
  }
  Conv1x1JoinParams p{};
  p.geometry = g, p.projection = g2;
  p.projects = p.makes_vectors = true;
  p.x = c.x.numel() ? c.x.const_data_ptr() : nullptr;
  p.weight = c.weight.numel() ? c.weight.const_data_ptr() : nullptr;
  p.x2 = second.x.numel() ? second.x.const_data_ptr() : nullptr;
  p.weight2 = second.weight.numel() ? second.weight.const_data_ptr() : nullptr;
  p.norms[0] = norm_of(behind(c)), p.norms[1] = norm_of(behind(second));
  p.out = output<void>(out);
  p.relu = c.step.relu;
  const cudaStream_t stream = current_stream(c.x);
  launch_as(c.op, c.x, [&](auto t) { launch_conv1x1_join<decltype(t)>(p, stream); });
  return out;
}

Tensor convolve_step(const ChainConvolution& c) {
  if (c.projection) return join_step(c);
  const ConvGeometry g = checked_geometry(c);
  const Tensor out = c.target({g.n, g.k, g.p, g.q}, [&] { return empty_images(c.x, g.n, g.k, g.p, g.q); });
  const OptionalTensor* b = c.behind;
  check_behind_conv(c.op, out, b[0], b[1], b[2], b[3], b[4], c.residual);
  convolve(c.op, out, c.x, c.weight, g, behind(c), c.residual);
  return out;
}

Tensor conv_chain(const Tensor& x, const OptionalTensor& residual, std::vector<OptionalTensor> tensors,
                  std::vector<int64_t> steps, std::vector<double> eps) {
  const DeviceGuard guard(x.get_device_index());
  return run_chain(x, residual, tensors, steps, eps, convolve_step, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, m) { m.impl("conv_chain", TORCH_BOX(&conv_chain)); }

}  // namespace resnet_fused::cuda
