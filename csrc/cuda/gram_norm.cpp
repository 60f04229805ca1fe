// gram_norm for CUDA tensors; the meaning is in resnet_fused/ops/gram_norm.py, the kernel in kernels/.

#include "../checks/gram_norm.h"
#include "statistics.h"

namespace resnet_fused::cuda {
namespace {

Statistics gram_norm(const Tensor& weight, const Tensor& gram, const Tensor& total, const Tensor& centre,
                     const Tensor& a, const OptionalTensor& gamma, const OptionalTensor& beta,
                     std::optional<double> eps) {
  check_gram_norm(weight, gram, total, centre, a, gamma, beta, eps);
  const DeviceGuard guard(weight.get_device_index());
  const int64_t outputs = weight.size(0), pixels = a.size(0) * a.size(2) * a.size(3);
  const StatisticsOutputs found(weight, pixels, outputs, gamma, beta, eps);
  const GramNormParams params{static_cast<int>(outputs),
                              static_cast<int>(weight.size(1)),
                              weight.numel() ? weight.const_data_ptr() : nullptr,
                              pointer<float>(gram),
                              pointer<float>(total),
                              pointer<float>(centre),
                              found.params};
  const cudaStream_t stream = current_stream(weight);
  launch_as("gram_norm", weight, [&](auto t) { launch_gram_norm<decltype(t)>(params, stream); });
  return found.results();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, m) { m.impl("gram_norm", TORCH_BOX(&gram_norm)); }

}  // namespace resnet_fused::cuda
