// Convolution with the weight as its module keeps it; batch norm, sum and ReLU on the accumulator: products of panels
// for 1x1, dot products where pixels are few.
#include "conv_norm_add_relu.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "../checks/conv_norm_add_relu.h"
#include "alloc.h"
#include "conv_pointwise.h"
#include "rows.h"

namespace resnet_fused::cpu {

ConvShape shape_of_conv(const Tensor& x, const Tensor& weight, const std::vector<int64_t>& stride,
                        const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  const auto outputs = [&](int i) {
    return (x.size(2 + i) + 2 * padding[i] - dilation[i] * (weight.size(2 + i) - 1) - 1) / stride[i] + 1;
  };
  return {x.size(0),
          x.size(1),
          x.size(2),
          x.size(3),
          weight.size(0),
          weight.size(2),
          weight.size(3),
          outputs(0),
          outputs(1),
          {stride[0], stride[1]},
          {padding[0], padding[1]},
          {dilation[0], dilation[1]},
          is_channels_last(weight)};
}

namespace {

constexpr int64_t kFewPixels = 8;  // up to which dot products of a 1x1 are at least as fast: measured at 512 to 2048

template <class A>
void convolve_as(const Tensor& out, const Tensor& x, const Tensor& weight, const ConvShape& shape, const BehindConv& v,
                 const Tensor* residual) {
  const Behind<A> behind{data<A>(v.bias),  data<A>(v.mean), data<A>(v.var),
                         data<A>(v.gamma), data<A>(v.beta), residual ? data<A>(*residual) : nullptr,
                         A(v.eps),         v.relu};
  if constexpr (std::is_same_v<A, float>) {
    const bool pointwise = shape.R * shape.S == 1 && shape.padding[0] + shape.padding[1] == 0;
    if (pointwise && shape.pixels() > kFewPixels) {
      const Pixels pixels(x, {shape.stride[0], shape.stride[1]});
      return convolve_pointwise({data<A>(x), data<A>(weight), data<A>(out), shape.C, shape.K, pixels, behind});
    }
  }
  convolve_few_pixels<A>(data<A>(out), data<A>(x), data<A>(weight), shape, behind);
}

}  // namespace

void convolve(const Tensor& out, const Tensor& x, const Tensor& weight, const ConvShape& shape,
              const BehindConv& behind, const Tensor* residual) {
  if (out.numel() == 0) return;
  const auto as = x.scalar_type() == ScalarType::Double ? convolve_as<double> : convolve_as<float>;
  as(out, x, weight, shape, behind, residual);
}

namespace {

Tensor conv_norm_add_relu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& mean,
                          const OptionalTensor& var, const OptionalTensor& gamma, const OptionalTensor& beta,
                          double eps, const OptionalTensor& residual, std::vector<int64_t> stride,
                          std::vector<int64_t> padding, std::vector<int64_t> dilation, bool relu) {
  const char* op = "conv_norm_add_relu";
  check_conv_norm_add_relu(op, x, weight, stride, padding, dilation);
  const ConvShape c = shape_of_conv(x, weight, stride, padding, dilation);
  Tensor out = empty_images(c.N, c.K, c.P, c.Q, x.scalar_type());
  check_behind_conv(op, out, bias, mean, var, gamma, beta, residual);
  convolve(out, x, weight, c, {bias, mean, var, gamma, beta, eps, relu}, residual ? &*residual : nullptr);
  return out;
}

void conv_norm_add_relu_(const Tensor& out, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& mean, const OptionalTensor& var, const OptionalTensor& gamma,
                         const OptionalTensor& beta, double eps, const OptionalTensor& residual,
                         std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                         bool relu, bool adds) {
  const char* op = "conv_norm_add_relu_";
  check_conv_norm_add_relu(op, x, weight, stride, padding, dilation);
  const ConvShape c = shape_of_conv(x, weight, stride, padding, dilation);
  check_target(op, out, x, {c.N, c.K, c.P, c.Q});
  if (adds && residual) fail(op, ": got a residual where out itself is one; pass either");
  check_behind_conv(op, out, bias, mean, var, gamma, beta, residual);
  check_apart(op, "x", x, out), check_apart(op, "weight", weight, out);
  if (residual) check_apart(op, "residual", *residual, out);
  convolve(out, x, weight, c, {bias, mean, var, gamma, beta, eps, relu}, adds ? &out : residual ? &*residual : nullptr);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("conv_norm_add_relu", TORCH_BOX(&conv_norm_add_relu));
  m.impl("conv_norm_add_relu_", TORCH_BOX(&conv_norm_add_relu_));
}

}  // namespace resnet_fused::cpu
