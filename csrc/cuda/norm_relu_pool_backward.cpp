// norm_relu_pool_backward for CUDA tensors; the meaning is in resnet_fused/ops/norm_relu_pool_backward.py.

#include "../checks/norm_relu_pool_backward.h"
#include "pool.h"

namespace resnet_fused::cuda {
namespace {

std::tuple<Tensor, Tensor> norm_relu_pool_backward(const Tensor& grad_out, const Tensor& index, const Tensor& z,
                                                   const Tensor& mean, const Tensor& scale, const Tensor& shift,
                                                   std::vector<int64_t> kernel, std::vector<int64_t> stride,
                                                   std::vector<int64_t> padding) {
  const char* op = "norm_relu_pool_backward";
  check_norm_relu_pool_backward(grad_out, index, z, mean, scale, shift, kernel, stride, padding);
  const PoolGeometry geometry = pool_geometry(op, z, kernel, stride, padding);
  const DeviceGuard guard(z.get_device_index());
  const auto sum_vector = [&] {
    Tensor sum = empty_like(z, {z.size(1)}, ScalarType::Float);
    return z.numel() ? sum : torch::stable::zero_(sum);  // nothing is launched that would write it
  };
  Tensor sum_g = sum_vector(), sum_gz = sum_vector();
  const Tensor scratch = empty_like(z, {z.numel() ? pool_partial_floats(geometry) : 0}, ScalarType::Float);
  const NormReluPoolBackwardParams params{geometry,
                                          pointer<void>(grad_out),
                                          pointer<uint8_t>(index),
                                          pointer<void>(z),
                                          pointer<float>(mean),
                                          pointer<float>(scale),
                                          pointer<float>(shift),
                                          output<float>(scratch),
                                          {output<float>(sum_g), output<float>(sum_gz)}};
  const cudaStream_t stream = current_stream(z);
  launch_as(op, z, [&](auto t) { launch_norm_relu_pool_backward<decltype(t)>(params, stream); });
  return {sum_g, sum_gz};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, m) {
  m.impl("norm_relu_pool_backward", TORCH_BOX(&norm_relu_pool_backward));
}

}  // namespace resnet_fused::cuda
