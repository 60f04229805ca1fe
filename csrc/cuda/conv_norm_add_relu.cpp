// conv_norm_add_relu and conv_norm_add_relu_ for CUDA tensors; the meaning is in
// resnet_fused/ops/conv_norm_add_relu.py, the kernel in kernels/.

#include "../checks/conv_norm_add_relu.h"
#include "convolve.h"

namespace resnet_fused::cuda {

void convolve(const char* op, const Tensor& out, const Tensor& x, const Tensor& weight, const ConvGeometry& geometry,
              const BehindConv& b, const OptionalTensor& residual) {
  const Tensor rows = in_rows(weight);
  const ConvNormAddReluParams params{geometry,
                                     x.numel() ? x.const_data_ptr() : nullptr,
                                     rows.numel() ? rows.const_data_ptr() : nullptr,
                                     norm_of(b),
                                     pointer<void>(residual),
                                     output<void>(out),
                                     b.relu};
  const cudaStream_t stream = current_stream(x);
  launch_as(op, x, [&](auto t) { launch_conv_norm_add_relu<decltype(t)>(params, stream); });
}

namespace {

Tensor conv_norm_add_relu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& mean,
                          const OptionalTensor& var, const OptionalTensor& gamma, const OptionalTensor& beta,
                          double eps, const OptionalTensor& residual, std::vector<int64_t> stride,
                          std::vector<int64_t> padding, std::vector<int64_t> dilation, bool relu) {
  const char* op = "conv_norm_add_relu";
  check_conv_norm_add_relu(op, x, weight, stride, padding, dilation, true);
  const ConvGeometry g = geometry_of(op, x, weight, stride, padding, dilation);
  const DeviceGuard guard(x.get_device_index());
  Tensor out = empty_images(x, g.n, g.k, g.p, g.q);
  check_behind_conv(op, out, bias, mean, var, gamma, beta, residual);
  convolve(op, out, x, weight, g, {bias, mean, var, gamma, beta, eps, relu}, residual);
  return out;
}

void conv_norm_add_relu_(const Tensor& out, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& mean, const OptionalTensor& var, const OptionalTensor& gamma,
                         const OptionalTensor& beta, double eps, const OptionalTensor& residual,
                         std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                         bool relu, bool adds) {
  const char* op = "conv_norm_add_relu_";
  check_conv_norm_add_relu(op, x, weight, stride, padding, dilation, true);
  const ConvGeometry g = geometry_of(op, x, weight, stride, padding, dilation);
  check_target(op, out, x, {g.n, g.k, g.p, g.q});
  if (adds && residual) fail(op, ": got a residual where out itself is one; pass either");
  check_behind_conv(op, out, bias, mean, var, gamma, beta, residual);
  check_apart(op, "x", x, out), check_apart(op, "weight", weight, out);
  if (residual) check_apart(op, "residual", *residual, out);
  const DeviceGuard guard(x.get_device_index());
  convolve(op, out, x, weight, g, {bias, mean, var, gamma, beta, eps, relu}, adds ? OptionalTensor(out) : residual);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, m) {
  m.impl("conv_norm_add_relu", TORCH_BOX(&conv_norm_add_relu));
  m.impl("conv_norm_add_relu_", TORCH_BOX(&conv_norm_add_relu_));
}

}  // namespace resnet_fused::cuda
