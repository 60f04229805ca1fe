// conv1x1_wgrad for CUDA tensors; the meaning is in resnet_fused/ops/conv1x1_wgrad.py, the kernel in kernels/.

#include <algorithm>
#include <array>

#include "../checks/conv1x1_wgrad.h"
#include "conv1x1_gradients.h"

namespace resnet_fused::cuda {

WgradSums start_wgrad(const char* op, const Tensor& g, Conv1x1WgradParams params, cudaStream_t stream) {
  WgradSums sums{empty_like(g, {0}, ScalarType::Float), 0};
  launch_as(op, g, [&](auto t) {
    using T = decltype(t);
    sums.splits = conv1x1_wgrad_splits<T>(params);
    if (sums.splits == 0) return;
    const int64_t size = static_cast<int64_t>(params.gradient.channels) * (params.input.channels + 1);
    sums.partial = empty_like(g, {sums.splits, size}, ScalarType::Float);
    params.partial = output<float>(sums.partial);
    start_conv1x1_wgrad<T>(params, stream);
  });
  return sums;
}

namespace {

#define RESNET_FUSED_TEXT_OF(name) #name
#define RESNET_FUSED_TEXT(name) RESNET_FUSED_TEXT_OF(name)

using WgradResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// What gram_grad makes of the sums over pixels.
WgradResults join_grad(const std::array<const Tensor*, 9>& arguments, const Tensor& sum_g) {
  std::array<StableIValue, 9> stack;
  std::transform(arguments.begin(), arguments.end(), stack.begin(),
                 [](const Tensor* t) { return torch::stable::detail::from(*t); });
  const char* op = RESNET_FUSED_TEXT(resnet_fused) "::gram_grad";
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
  const auto result = [&](size_t i) { return torch::stable::detail::to<Tensor>(stack[i]); };
  Tensor grad_weight = result(0), grad_gamma = result(1), coupling = result(2), constant = result(3);
  return {grad_weight, sum_g, grad_gamma, coupling, constant};
}

WgradResults conv1x1_wgrad(const Tensor& g, const Tensor& x, const OptionalTensor& mask, const OptionalTensor& z,
                           const OptionalTensor& a, const OptionalTensor& b, const OptionalTensor& d,
                           const OptionalTensor& scale, const OptionalTensor& shift,
                           const OptionalTensor& sample_factor, const OptionalTensor& x_scale,
                           const OptionalTensor& x_shift, std::vector<int64_t> stride, bool rounded,
                           const OptionalTensor& join_weight, const OptionalTensor& gram, const OptionalTensor& total,
                           const OptionalTensor& centre, const OptionalTensor& join_scale,
                           const OptionalTensor& join_rstd) {
  const char* op = "conv1x1_wgrad";
  check_gradient(op, g, mask, z, a, b, d, scale, shift, sample_factor, true);
  check_conv1x1_wgrad(g, x, x_scale, x_shift, stride, {&join_weight, &gram, &total, &centre, &join_scale, &join_rstd},
                      true);
  const int64_t K = g.size(1), C = x.size(1);
  check_sizes(op, g, x, K, C);
  const DeviceGuard guard(g.get_device_index());
  const bool joins = join_weight.has_value(), rounds = rounded && !joins;
  Tensor grad_weight = empty_like(g, {K, C}, rounds ? g.scalar_type() : ScalarType::Float);
  Tensor sum_g = empty_like(g, {K}, ScalarType::Float);
  const Conv1x1WgradParams params{gradient_of(g, mask, z, a, b, d, scale, shift, sample_factor),
                                  input_of(g, x, C, x_scale, x_shift, stride),
                                  nullptr,
                                  output<void>(grad_weight),
                                  output<float>(sum_g),
                                  rounds};
  const cudaStream_t stream = current_stream(g);
  const WgradSums sums = start_wgrad(op, g, params, stream);
  if (sums.splits == 0) {
    torch::stable::zero_(grad_weight);
    torch::stable::zero_(sum_g);
  } else {
    Conv1x1WgradParams added = params;
    added.partial = output<float>(sums.partial);
    launch_as(op, g, [&](auto t) { add_conv1x1_wgrad<decltype(t)>(added, sums.splits, stream); });
  }
  const auto none = [&](ScalarType dtype) { return empty_like(g, {0}, dtype); };
  if (!joins) {
    return {grad_weight, sum_g, none(ScalarType::Float), none(g.scalar_type()), none(ScalarType::Float)};
  }
  return join_grad({&*join_weight, &grad_weight, &*gram, &*total, &*centre, &sum_g, &*join_scale, &*join_rstd, &g},
                   sum_g);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, m) { m.impl("conv1x1_wgrad", TORCH_BOX(&conv1x1_wgrad)); }

}  // namespace resnet_fused::cuda
