// gram_grad for CUDA tensors; the meaning is in resnet_fused/ops/gram_grad.py, the kernel in kernels/.

#include "../checks/gram_grad.h"
#include "common.h"

namespace resnet_fused::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> gram_grad(const Tensor& weight, const Tensor& product, const Tensor& gram,
                                                     const Tensor& total, const Tensor& centre, const Tensor& sum_g,
                                                     const Tensor& scale, const Tensor& rstd, const Tensor& a) {
  check_gram_grad(weight, product, gram, total, centre, sum_g, scale, rstd, a);
  const DeviceGuard guard(weight.get_device_index());
  const int64_t outputs = weight.size(0), channels = weight.size(1), pixels = a.size(0) * a.size(2) * a.size(3);
  Tensor grad_weight = empty_like(weight, {outputs, channels}, weight.scalar_type());
  Tensor grad_gamma = empty_like(weight, {outputs}, ScalarType::Float);
  Tensor coupling = empty_like(weight, {channels, channels, 1, 1}, weight.scalar_type());
  Tensor constant = empty_like(weight, {channels}, ScalarType::Float);
  if (pixels == 0) {
    for (Tensor* result : {&grad_weight, &grad_gamma, &coupling, &constant}) torch::stable::zero_(*result);
    return {grad_weight, grad_gamma, coupling, constant};
  }
  const Tensor scratch = empty_like(weight, {gram_grad_scratch_floats(outputs, channels)}, ScalarType::Float);
  const GramGradParams params{pixels,
                              static_cast<int>(outputs),
                              static_cast<int>(channels),
                              weight.numel() ? weight.const_data_ptr() : nullptr,
                              pointer<float>(product),
                              pointer<float>(gram),
                              pointer<float>(total),
                              pointer<float>(centre),
                              pointer<float>(sum_g),
                              pointer<float>(scale),
                              pointer<float>(rstd),
                              output<float>(scratch),
                              output<void>(grad_weight),
                              output<float>(grad_gamma),
                              output<void>(coupling),
                              output<float>(constant)};
  const cudaStream_t stream = current_stream(weight);
  launch_as("gram_grad", weight, [&](auto t) { launch_gram_grad<decltype(t)>(params, stream); });
  return {grad_weight, grad_gamma, coupling, constant};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, m) { m.impl("gram_grad", TORCH_BOX(&gram_grad)); }

}  // namespace resnet_fused::cuda
