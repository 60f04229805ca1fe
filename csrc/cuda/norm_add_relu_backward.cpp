// norm_add_relu_backward for CUDA tensors; the meaning is in resnet_fused/ops/norm_add_relu_backward.py.

#include "../checks/norm_add_relu_backward.h"
#include "common.h"

namespace resnet_fused::cuda {
namespace {

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Results norm_add_relu_backward(const Tensor& grad_out, const OptionalTensor& z, const OptionalTensor& mean,
                               const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& mask,
                               const OptionalTensor& residual, const OptionalTensor& residual_mean,
                               const OptionalTensor& sample_factor, bool relu, bool emit_grad) {
  check_norm_add_relu_backward(grad_out, z, mean, scale, shift, mask, residual, residual_mean, sample_factor, relu);
  const DeviceGuard guard(grad_out.get_device_index());
  const Extent extent = extent_of(grad_out);
  Tensor g = emit_grad ? empty_channels_last(grad_out) : empty_like(grad_out, {0}, grad_out.scalar_type());
  const bool empty = extent.rows == 0 || extent.channels == 0;
  const auto sum_vector = [&](bool present) {
    Tensor sum = empty_like(grad_out, {present ? extent.channels : 0}, ScalarType::Float);
    return empty ? torch::stable::zero_(sum) : sum;  // nothing is launched that would write it
  };
  Tensor sum_g = sum_vector(true), sum_gz = sum_vector(z.has_value());
  Tensor residual_sum_g = sum_vector(residual.has_value()), residual_sum_gz = sum_vector(residual.has_value());
  const Tensor scratch =
      empty_like(grad_out, {empty ? 0 : partial_floats(extent, residual.has_value())}, ScalarType::Float);
  const bool bits = mask && mask->scalar_type() == ScalarType::Byte;
  const bool recompute = relu && !mask;
  NormAddReluBackwardParams params{
      extent,
      grad_out.const_data_ptr(),
      pointer<void>(z),
      pointer<float>(mean),
      recompute ? pointer<float>(scale) : nullptr,
      recompute ? pointer<float>(shift) : nullptr,
      relu && bits ? pointer<uint8_t>(mask) : nullptr,
      relu && !bits ? pointer<void>(mask) : nullptr,
      pointer<void>(residual),
      pointer<float>(residual_mean),
      pointer<float>(sample_factor),
      output<void>(g),
      output<float>(scratch),
      {output<float>(sum_g), output<float>(sum_gz), output<float>(residual_sum_g), output<float>(residual_sum_gz)}};
  const cudaStream_t stream = current_stream(grad_out);
  launch_as("norm_add_relu_backward", grad_out,
            [&](auto t) { launch_norm_add_relu_backward<decltype(t)>(params, stream); });
  return {g, sum_g, sum_gz, residual_sum_g, residual_sum_gz};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, m) {
  m.impl("norm_add_relu_backward", TORCH_BOX(&norm_add_relu_backward));
}

}  // namespace resnet_fused::cuda
