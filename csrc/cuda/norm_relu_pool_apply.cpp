// norm_relu_pool_apply for CUDA tensors; the meaning is in resnet_fused/ops/norm_relu_pool_apply.py.

#include "../checks/norm_relu_pool_apply.h"
#include "pool.h"

namespace resnet_fused::cuda {
namespace {

Tensor norm_relu_pool_apply(const Tensor& grad_out, const Tensor& index, const Tensor& z, const Tensor& a,
                            const OptionalTensor& b, const OptionalTensor& d, const Tensor& scale, const Tensor& shift,
                            std::vector<int64_t> kernel, std::vector<int64_t> stride, std::vector<int64_t> padding) {
  const char* op = "norm_relu_pool_apply";
  check_norm_relu_pool_apply(op, grad_out, index, z, a, b, d, scale, shift, kernel, stride, padding);
  const DeviceGuard guard(z.get_device_index());
  Tensor dz = empty_channels_last(z);
  const NormReluPoolApplyParams params{pool_geometry(op, z, kernel, stride, padding),
                                       pointer<void>(grad_out),
                                       pointer<uint8_t>(index),
                                       pointer<void>(z),
                                       pointer<float>(a),
                                       pointer<float>(b),
                                       pointer<float>(d),
                                       pointer<float>(scale),
                                       pointer<float>(shift),
                                       output<void>(dz)};
  const cudaStream_t stream = current_stream(z);
  launch_as(op, z, [&](auto t) { launch_norm_relu_pool_apply<decltype(t)>(params, stream); });
  return dz;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, m) { m.impl("norm_relu_pool_apply", TORCH_BOX(&norm_relu_pool_apply)); }

}  // namespace resnet_fused::cuda
