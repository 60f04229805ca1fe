// The input's gradient of a 1x1 convolution from a lazy gradient, applied on load, and if asked the weight's from the
// same read. Epilogue: the Gram join's correction, the other path's gradient, or the ReLU before and its batch norm's
// sums.
// Bytes: the gradient, x if used, the residual and grad_x once; FLOPs 2*M*K*C for each gradient, 2*M*C*C for a
// coupling.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "../checks/conv1x1_dgrad.h"
#include "coefficients.h"
#include "conv1x1_gradients.h"

namespace resnet_fused::cpu {
namespace {

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Results conv1x1_dgrad(const Tensor& g, const OptionalTensor& weight, const OptionalTensor& mask,
                      const OptionalTensor& z, const OptionalTensor& a, const OptionalTensor& b,
                      const OptionalTensor& d, const OptionalTensor& scale, const OptionalTensor& shift,
                      const OptionalTensor& sample_factor, const OptionalTensor& x, const OptionalTensor& x_scale,
                      const OptionalTensor& x_shift, const OptionalTensor& x_mean, const OptionalTensor& coupling,
                      const OptionalTensor& constant, const OptionalTensor& residual,
                      const OptionalTensor& residual_mask, const std::vector<int64_t>& residual_stride,
                      const std::vector<int64_t>& x_stride, const OptionalTensor& x_rstd, bool weight_grad) {
  check_gradient("conv1x1_dgrad", g, mask, z, a, b, d, scale, shift, sample_factor);
  check_conv1x1_dgrad(g, weight, {x, x_scale, x_shift, x_mean, x_rstd, x_stride},
                      {coupling, constant, residual, residual_mask, residual_stride}, weight_grad);
  const int64_t N = g.size(0), H = g.size(2), W = g.size(3), K = g.size(1), C = weight ? weight->size(1) : K;
  Tensor grad_x = empty_images(N, C, H, W, ScalarType::Float);
  const int64_t K_of_weight = weight_grad ? K : 0, summed = x_scale ? C : 0;
  Tensor grad_weight =
      weight_grad ? empty_strided<2>({K, C}, {C, 1}, ScalarType::Float) : empty_vector(K_of_weight, ScalarType::Float);
  Tensor sum_g = empty_vector(summed, ScalarType::Float), sum_gx = empty_vector(summed, ScalarType::Float);
  std::vector<float> ones;
  Conv1x1Backward p{};
  p.gradient = gradient_of(g, mask, z, a, b, d, scale, shift, sample_factor, ones);
  const Pixels pixels(x ? *x : g, x ? x_stride : std::vector<int64_t>{1, 1});
  p.input = {data<float>(x), data<float>(x_scale), data<float>(x_shift), C, pixels};
  p.weight = data<float>(weight), p.coupling = data<float>(coupling);
  p.constant = data<float>(constant), p.mean = data<float>(x_mean);
  p.added = {data<float>(residual), data<uint8_t>(residual_mask), H, W, residual_stride[0], residual_stride[1]};
  p.grad_x = data<float>(grad_x), p.through = x_scale.has_value(), p.weight_grad = weight_grad;
  p.rows = N * H * W, p.K = K, p.C = C;
  BackwardResults results{weight_grad ? data<float>(grad_weight) : nullptr};
  if (x_scale) results.sum_g = data<float>(sum_g), results.sum_gx = data<float>(sum_gx);
  run_backward(p, results);
  const auto none = [] { return empty_vector(0, ScalarType::Float); };
  if (!x_rstd) return {grad_x, sum_g, sum_gx, none(), none(), none(), grad_weight};
  const auto [slope, offset, grad_gamma] = coefficients(sum_g, sum_gx, *x_mean, *x_rstd, *x_scale, *x);
  return {grad_x, sum_g, none(), slope, offset, grad_gamma, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { m.impl("conv1x1_dgrad", TORCH_BOX(&conv1x1_dgrad)); }

}  // namespace resnet_fused::cpu
