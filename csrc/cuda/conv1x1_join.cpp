// conv1x1_join for CUDA tensors; the meaning is in resnet_fused/ops/conv1x1_join.py, the kernel in kernels/.

#include "../checks/conv1x1_join.h"
#include "conv_geometry.h"

namespace resnet_fused::cuda {
namespace {

std::tuple<Tensor, Tensor> conv1x1_join(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift,
                                        const OptionalTensor& x_scale, const OptionalTensor& x_shift,
                                        const OptionalTensor& residual, const OptionalTensor& residual_scale,
                                        const OptionalTensor& residual_shift, const OptionalTensor& x2,
                                        const OptionalTensor& weight2, const OptionalTensor& scale2,
                                        const OptionalTensor& shift2, std::vector<int64_t> stride2,
                                        const OptionalTensor& sample_factor, bool relu, bool emit_mask) {
  const char* op = "conv1x1_join";
  check_conv1x1_join(x, weight, scale, shift, x_scale, x_shift, {residual, residual_scale, residual_shift},
                     {x2, weight2, scale2, shift2, stride2}, sample_factor, true);
  const ConvGeometry g = geometry_of(op, x, weight, {1, 1}, {0, 0}, {1, 1});
  const ConvGeometry projection = x2 ? geometry_of(op, *x2, *weight2, stride2, {0, 0}, {1, 1}) : g;
  const DeviceGuard guard(x.get_device_index());
  const int64_t pixels = static_cast<int64_t>(g.n) * g.p * g.q, bytes = (static_cast<int64_t>(g.k) + 7) / 8;
  Tensor out = empty_like(x, {g.n, g.k, g.p, g.q}, x.scalar_type(), torch::headeronly::MemoryFormat::ChannelsLast);
  Tensor mask = emit_mask ? empty_like(x, {pixels, bytes}, ScalarType::Byte) : empty_like(x, {0}, ScalarType::Byte);
  const Conv1x1JoinParams params{g,
                                 x.numel() ? x.const_data_ptr() : nullptr,
                                 pointer<float>(x_scale),
                                 pointer<float>(x_shift),
                                 weight.numel() ? weight.const_data_ptr() : nullptr,
                                 {pointer<float>(scale), pointer<float>(shift), pointer<float>(residual_scale),
                                  pointer<float>(residual_shift), pointer<float>(scale2), pointer<float>(shift2)},
                                 pointer<void>(residual),
                                 x2.has_value(),
                                 projection,
                                 pointer<void>(x2),
                                 pointer<void>(weight2),
                                 pointer<float>(sample_factor),
                                 output<void>(out),
                                 output<uint8_t>(mask),
                                 relu,
                                 false,
                                 {}};
  const cudaStream_t stream = current_stream(x);
  launch_as(op, x, [&](auto t) { launch_conv1x1_join<decltype(t)>(params, stream); });
  return {out, mask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, m) { m.impl("conv1x1_join", TORCH_BOX(&conv1x1_join)); }

}  // namespace resnet_fused::cuda
