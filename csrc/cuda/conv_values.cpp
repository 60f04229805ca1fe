// conv_values for CUDA tensors; the meaning is in resnet_fused/ops/conv_values.py, the kernel is that of conv1x1, which
// takes any filter.

#include "../checks/conv_values.h"
#include "convolve_values.h"

namespace resnet_fused::cuda {

Convolved convolve_values(const char* op, const Tensor& x, const Tensor& weight, const OptionalTensor& x_scale,
                          const OptionalTensor& x_shift, const ConvGeometry& g, bool emit_stats,
                          const OptionalTensor& gamma, const OptionalTensor& beta, std::optional<double> eps) {
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
  launch_as(op, x, [&](auto t) {
    using T = decltype(t);
    if (outputs > 0) scratch = empty_like(x, {conv1x1_partial_floats<T>(params)}, ScalarType::Float);
    params.partial = output<float>(scratch);
    launch_conv1x1<T>(params, stream);
  });
  return std::tuple_cat(std::make_tuple(z), found.results());
}

namespace {

Convolved conv_values(const Tensor& x, const Tensor& weight, const OptionalTensor& x_scale,
                      const OptionalTensor& x_shift, std::vector<int64_t> stride, std::vector<int64_t> padding,
                      std::vector<int64_t> dilation, bool emit_stats, const OptionalTensor& gamma,
                      const OptionalTensor& beta, std::optional<double> eps) {
  const char* op = "conv_values";
  check_conv_values(x, weight, x_scale, x_shift, stride, padding, dilation, gamma, beta, eps);
  const ConvGeometry g = geometry_of(op, x, weight, stride, padding, dilation);
  const DeviceGuard guard(x.get_device_index());
  return convolve_values(op, x, in_rows(weight), x_scale, x_shift, g, emit_stats, gamma, beta, eps);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, m) { m.impl("conv_values", TORCH_BOX(&conv_values)); }

}  // namespace resnet_fused::cuda
