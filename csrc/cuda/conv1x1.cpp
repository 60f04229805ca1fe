// conv1x1 for CUDA tensors; the meaning is in resnet_fused/ops/conv1x1.py, the kernel in kernels/.

#include "../checks/conv1x1.h"
#include "conv_geometry.h"
#include "statistics.h"

namespace resnet_fused::cuda {
namespace {

using Convolved = decltype(std::tuple_cat(std::tuple<Tensor>(), Statistics()));

Convolved conv1x1(const Tensor& x, const Tensor& weight, const OptionalTensor& x_scale, const OptionalTensor& x_shift,
                  std::vector<int64_t> stride, bool emit_stats, const OptionalTensor& gamma, const OptionalTensor& beta,
                  std::optional<double> eps) {
  check_conv1x1(x, weight, x_scale, x_shift, stride, gamma, beta, eps, true);
  const ConvGeometry g = geometry_of("conv1x1", x, weight, stride, {0, 0}, {1, 1});
  const DeviceGuard guard(x.get_device_index());
  Tensor z = empty_like(x, {g.n, g.k, g.p, g.q}, x.scalar_type(), torch::headeronly::MemoryFormat::ChannelsLast);
  const int64_t pixels = static_cast<int64_t>(g.n) * g.p * g.q, outputs = emit_stats ? g.k : 0;
  const StatisticsOutputs found(x, pixels, outputs, gamma, beta, emit_stats ? eps : std::nullopt);
  Conv1x1Params params{g,
                       x.numel() ? x.const_data_ptr() : nullptr,
                       pointer<float>(x_scale),
                       pointer<float>(x_shift),
                       weight.numel() ? weight.const_data_ptr() : nullptr,
                       output<void>(z),
                       nullptr,
                       found.params};
  Tensor scratch = empty_like(x, {0}, ScalarType::Float);
  const cudaStream_t stream = current_stream(x);
  launch_as("conv1x1", x, [&](auto t) {
    using T = decltype(t);
    if (outputs > 0) scratch = empty_like(x, {conv1x1_partial_floats<T>(params)}, ScalarType::Float);
    params.partial = output<float>(scratch);
    launch_conv1x1<T>(params, stream);
  });
  return std::tuple_cat(std::make_tuple(z), found.results());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, m) { m.impl("conv1x1", TORCH_BOX(&conv1x1)); }

}  // namespace resnet_fused::cuda
