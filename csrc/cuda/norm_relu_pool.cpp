// norm_relu_pool for CUDA tensors; the meaning is in resnet_fused/ops/norm_relu_pool.py, the kernel in kernels/.

#include "../checks/norm_relu_pool.h"
#include "pool.h"

namespace resnet_fused::cuda {
namespace {

std::tuple<Tensor, Tensor> norm_relu_pool(const Tensor& z, const Tensor& scale, const Tensor& shift,
                                          std::vector<int64_t> kernel, std::vector<int64_t> stride,
                                          std::vector<int64_t> padding) {
  const char* op = "norm_relu_pool";
  check_norm_relu_pool(z, scale, shift, kernel, stride, padding);
  const PoolGeometry geometry = pool_geometry(op, z, kernel, stride, padding);
  const DeviceGuard guard(z.get_device_index());
  const auto pooled = [&](ScalarType dtype) {
    return empty_like(z, {geometry.samples, geometry.channels, geometry.h.windows, geometry.w.windows}, dtype,
                      torch::headeronly::MemoryFormat::ChannelsLast);
  };
  Tensor out = pooled(z.scalar_type()), index = pooled(ScalarType::Byte);
  const NormReluPoolParams params{geometry,
                                  z.numel() ? z.const_data_ptr() : nullptr,
                                  pointer<float>(scale),
                                  pointer<float>(shift),
                                  output<void>(out),
                                  output<uint8_t>(index)};
  const cudaStream_t stream = current_stream(z);
  launch_as(op, z, [&](auto t) { launch_norm_relu_pool<decltype(t)>(params, stream); });
  return {out, index};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, m) { m.impl("norm_relu_pool", TORCH_BOX(&norm_relu_pool)); }

}  // namespace resnet_fused::cuda
