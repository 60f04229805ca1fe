// The weight's gradient of a 1x1 convolution from a lazy gradient and a lazy activation, both applied on load.
// Of a Gram join gram_grad follows.
// Bytes: the gradient and the pixels of x once; FLOPs 2*M*K*C.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "../checks/conv1x1_wgrad.h"
#include "conv1x1_gradients.h"

namespace resnet_fused::cpu {
namespace {

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// What gram_grad makes of the sums over pixels.
Results join_grad(const std::array<const Tensor*, 9>& arguments, const Tensor& sum_g) {
  std::array<StableIValue, 9> stack;
  std::transform(arguments.begin(), arguments.end(), stack.begin(),
                 [](const Tensor* t) { return torch::stable::detail::from(*t); });
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("resnet_fused::gram_grad", "", stack.data(), TORCH_ABI_VERSION));
  const auto result = [&](size_t i) { return torch::stable::detail::to<Tensor>(stack[i]); };
  Tensor grad_weight = result(0), grad_gamma = result(1), coupling = result(2), constant = result(3);
  return {grad_weight, sum_g, grad_gamma, coupling, constant};
}

Results conv1x1_wgrad(const Tensor& g, const Tensor& x, const OptionalTensor& mask, const OptionalTensor& z,
                      const OptionalTensor& a, const OptionalTensor& b, const OptionalTensor& d,
                      const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& sample_factor,
                      const OptionalTensor& x_scale, const OptionalTensor& x_shift, const std::vector<int64_t>& stride,
                      bool, const OptionalTensor& join_weight, const OptionalTensor& gram, const OptionalTensor& total,
                      const OptionalTensor& centre, const OptionalTensor& join_scale, const OptionalTensor& join_rstd) {
  check_gradient("conv1x1_wgrad", g, mask, z, a, b, d, scale, shift, sample_factor);
  check_conv1x1_wgrad(g, x, x_scale, x_shift, stride, {&join_weight, &gram, &total, &centre, &join_scale, &join_rstd});
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
  if (!join_weight) {
    const auto none = [] { return empty_vector(0, ScalarType::Float); };
    return {grad_weight, sum_dz, none(), none(), none()};
  }
  return join_grad({&*join_weight, &grad_weight, &*gram, &*total, &*centre, &sum_dz, &*join_scale, &*join_rstd, &g},
                   sum_dz);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { m.impl("conv1x1_wgrad", TORCH_BOX(&conv1x1_wgrad)); }

}  // namespace resnet_fused::cpu
