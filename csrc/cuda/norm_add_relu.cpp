// norm_add_relu for CUDA tensors; the meaning is in resnet_fused/ops/norm_add_relu.py, the kernel in kernels/.

#include "../checks/norm_add_relu.h"
#include "common.h"

namespace resnet_fused::cuda {
namespace {

std::tuple<Tensor, Tensor> norm_add_relu(const Tensor& z, const Tensor& scale, const Tensor& shift,
                                         const OptionalTensor& residual, const OptionalTensor& residual_scale,
                                         const OptionalTensor& residual_shift, const OptionalTensor& sample_factor,
                                         bool relu, bool emit_mask) {
  check_norm_add_relu(z, scale, shift, residual, residual_scale, residual_shift, sample_factor);
  const DeviceGuard guard(z.get_device_index());
  const Extent extent = extent_of(z);
  Tensor out = empty_channels_last(z);
  Tensor mask = emit_mask ? empty_like(z, {extent.rows, (extent.channels + 7) / 8}, ScalarType::Byte)
                          : empty_like(z, {0}, ScalarType::Byte);
  const NormAddReluParams params{extent,
                                 z.const_data_ptr(),
                                 pointer<float>(scale),
                                 pointer<float>(shift),
                                 pointer<void>(residual),
                                 pointer<float>(residual_scale),
                                 pointer<float>(residual_shift),
                                 pointer<float>(sample_factor),
                                 out.mutable_data_ptr(),
                                 output<uint8_t>(mask),
                                 relu};
  const cudaStream_t stream = current_stream(z);
  launch_as("norm_add_relu", z, [&](auto t) { launch_norm_add_relu<decltype(t)>(params, stream); });
  return {out, mask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, m) { m.impl("norm_add_relu", TORCH_BOX(&norm_add_relu)); }

}  // namespace resnet_fused::cuda
