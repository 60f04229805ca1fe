// The weight's gradient of a 1x1 convolution from a lazy gradient and a lazy activation, both applied on load.
// Bytes: the gradient and the pixels of x once; FLOPs 2*M*K*C.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "../checks/conv1x1_gradient.h"
#include "conv1x1_backward.h"

namespace resnet_fused::cpu {
namespace {

std::tuple<Tensor, Tensor> conv1x1_wgrad_sums(const Tensor& g, const Tensor& x, const OptionalTensor& mask,
                                              const OptionalTensor& z, const OptionalTensor& a, const OptionalTensor& b,
                                              const OptionalTensor& d, const OptionalTensor& scale,
                                              const OptionalTensor& shift, const OptionalTensor& sample_factor,
                                              const OptionalTensor& x_scale, const OptionalTensor& x_shift,
                                              const std::vector<int64_t>& stride) {
  check_gradient("conv1x1_wgrad", g, mask, z, a, b, d, scale, shift, sample_factor);
  check_input("conv1x1_wgrad", x, x.size(1), stride, g);
  check_pair("conv1x1_wgrad", "x_scale", x_scale, "x_shift", x_shift, x);
  const int64_t K = g.size(1), C = x.size(1);
  Tensor grad_weight = empty_strided<2>({K, C}, {C, 1}, ScalarType::Float);
  Tensor sum_dz = empty_vector(K, ScalarType::Float);
  std::vector<float> ones;
  Conv1x1Backward p{};
  p.gradient = gradient_of(g, mask, z, a, b, d, scale, shift, sample_factor, ones);
  p.input = {data<float>(x), data<float>(x_scale), data<float>(x_shift), C, Pixels(x, stride)};
  p.weight_grad = p.sum_dz = true;
  p.rows = g.size(0) * g.size(2) * g.size(3), p.K = K, p.C = C;
  run_backward(p, {data<float>(grad_weight), nullptr, nullptr, data<float>(sum_dz)});
  return {grad_weight, sum_dz};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { m.impl("conv1x1_wgrad_sums", TORCH_BOX(&conv1x1_wgrad_sums)); }

}  // namespace resnet_fused::cpu
