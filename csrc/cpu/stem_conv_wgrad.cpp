// The gradient of the weight of a convolution of few channels: one read of the gradient at its output and of x.
#include "../checks/stem_conv_wgrad.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "stem_wgrad.h"

namespace resnet_fused::cpu {
namespace {

Tensor stem_conv_wgrad(const Tensor& grad, const Tensor& x, const Tensor& weight, const std::vector<int64_t>& stride,
                       const std::vector<int64_t>& padding) {
  check_stem_conv_wgrad("stem_conv_wgrad", grad, x, weight, stride, padding);
  Stem p(x, weight, stride, padding);
  Tensor out = empty_like_weight(weight);
  if (out.numel() == 0) return out;
  if (grad.numel() == 0) return torch::stable::zero_(out);
  const bool finite =
      stem_gradient(p, out, [&] { return [&](int64_t row) { return data<float>(grad) + row * p.Q * p.K; }; });
  if (!finite) stem_gradient_by_aten(grad, x, weight, stride, padding, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { m.impl("stem_conv_wgrad", TORCH_BOX(&stem_conv_wgrad)); }

}  // namespace resnet_fused::cpu
