// conv_join for CUDA tensors; the meaning is in resnet_fused/ops/conv_join.py, the kernel is that of
// conv_norm_add_relu, given scale and shift.

#include "../checks/conv_join.h"

#include "conv_geometry.h"

namespace resnet_fused::cuda {
namespace {

std::tuple<Tensor, Tensor> conv_join(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift,
                                     const OptionalTensor& residual, std::vector<int64_t> stride,
                                     std::vector<int64_t> padding, std::vector<int64_t> dilation,
                                     const OptionalTensor& sample_factor, bool relu, bool emit_mask) {
  const char* op = "conv_join";
  check_conv_join(x, weight, scale, shift, stride, padding, dilation, sample_factor);
  const ConvGeometry g = geometry_of(op, x, weight, stride, padding, dilation);
  const DeviceGuard guard(x.get_device_index());
  const Tensor out = empty_images(x, g.n, g.k, g.p, g.q);
  if (residual) check_like(op, "residual", *residual, "the result", out);
  const int64_t pixels = static_cast<int64_t>(g.n) * g.p * g.q, bytes = (static_cast<int64_t>(g.k) + 7) / 8;
  const Tensor mask =
      emit_mask ? empty_like(x, {pixels, bytes}, ScalarType::Byte) : empty_like(x, {0}, ScalarType::Byte);
  const Tensor rows = in_rows(weight);
  const ConvNormAddReluParams params{g,
                                     x.numel() ? x.const_data_ptr() : nullptr,
                                     rows.numel() ? rows.const_data_ptr() : nullptr,
                                     {},
                                     pointer<void>(residual),
                                     output<void>(out),
                                     relu,
                                     pointer<float>(scale),
                                     pointer<float>(shift),
                                     pointer<float>(sample_factor),
                                     output<uint8_t>(mask)};
  const cudaStream_t stream = current_stream(x);
  launch_as(op, x, [&](auto t) { launch_conv_norm_add_relu<decltype(t)>(params, stream); });
  return {out, mask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, m) { m.impl("conv_join", TORCH_BOX(&conv_join)); }

}  // namespace resnet_fused::cuda
