// bn_stats for CUDA tensors; the meaning is in resnet_fused/ops/bn_stats.py, the kernels in kernels/.

#include "../checks/bn_stats.h"
#include "statistics.h"

namespace resnet_fused::cuda {
namespace {

Statistics bn_stats(const Tensor& z, const OptionalTensor& gamma, const OptionalTensor& beta,
                    std::optional<double> eps) {
  check_bn_stats(z, gamma, beta, eps);
  const DeviceGuard guard(z.get_device_index());
  const Extent extent = extent_of(z);
  const StatisticsOutputs found(z, extent.rows, extent.channels, gamma, beta, eps);
  const Tensor scratch = empty_like(z, {bn_stats_partial_floats(extent)}, ScalarType::Float);
  const BnStatsParams params{extent, z.numel() ? z.const_data_ptr() : nullptr, output<float>(scratch), found.params};
  const cudaStream_t stream = current_stream(z);
  launch_as("bn_stats", z, [&](auto t) { launch_bn_stats<decltype(t)>(params, stream); });
  return found.results();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, m) { m.impl("bn_stats", TORCH_BOX(&bn_stats)); }

}  // namespace resnet_fused::cuda
