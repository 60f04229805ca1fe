// What the ops that average over windows check alike; what stock refuses too, in stock's words.
#pragma once

#include <array>
#include <vector>

#include "common.h"

namespace resnet_fused {

// How far the pixels of channels of a channels_last tensor lie apart; -1: t is no such channels. The stride of a
// dimension of size 1 says nothing.
inline int64_t pixel_pitch(const Tensor& t) {
  if (t.numel() == 0) return t.size(1);
  if (t.size(1) != 1 && t.stride(1) != 1) return -1;
  const int64_t pixels[3] = {t.size(2) * t.size(3), t.size(3), 1}, dims[3] = {0, 2, 3};
  int64_t pitch = 0;
  for (int i = 0; i < 3; ++i) {
    if (t.size(dims[i]) == 1) continue;
    if (t.stride(dims[i]) % pixels[i] != 0) return -1;
    const int64_t found = t.stride(dims[i]) / pixels[i];
    if (found < t.size(1) || (pitch != 0 && found != pitch)) return -1;
    pitch = found;
  }
  return pitch == 0 ? t.size(1) : pitch;
}

// What is averaged: decides dtype, device and shape of all others.
inline void check_averaged(const char* op, const Tensor& x) {
  if (x.dim() != 4) fail(op, ": x has shape ", shape_of(x), "; pass a [N, C, H, W] tensor");
  const ScalarType dtype = x.scalar_type();
  if (dtype != ScalarType::Double && dtype != ScalarType::Float && dtype != ScalarType::BFloat16 &&
      dtype != ScalarType::Half) {
    fail(op, ": x is ", dtype, "; pass Float, BFloat16, Half or Double");
  }
  if (pixel_pitch(x) < 0) {
    fail(op, ": x of shape ", shape_of(x), " is neither channels_last nor channels of such a tensor; pass ",
         "x.contiguous(memory_format=torch.channels_last)");
  }
}

// What stock's avg_pool2d refuses, in its words. Returns height and width of the result.
inline std::array<int64_t, 2> check_average_pooling(const char* op, const Tensor& x, const std::vector<int64_t>& kernel,
                                                    const std::vector<int64_t>& stride) {
  if (kernel.size() != 2 || stride.size() != 2) {
    fail(op, ": kernel and stride have ", kernel.size(), " and ", stride.size(), " entries; pass two of each");
  }
  if (stride[0] == 0 || stride[1] == 0) fail("stride should not be zero");
  if (kernel[0] < 1 || kernel[1] < 1) {
    fail("kernel size should be greater than zero, but got kH: ", kernel[0], " kW: ", kernel[1]);
  }
  if (stride[0] < 1 || stride[1] < 1) {
    fail("stride should be greater than zero, but got dH: ", stride[0], " dW: ", stride[1]);
  }
  if (x.size(1) == 0 || x.size(2) == 0 || x.size(3) == 0) {
    fail("Expected 3D or 4D (batch mode) tensor with optional 0 dim batch size for input, but got:", shape_of(x));
  }
  std::array<int64_t, 2> size;
  for (int i = 0; i < 2; ++i) {
    const int64_t room = x.size(2 + i) - kernel[i];
    size[i] = room < 0 ? 0 : room / stride[i] + 1;
  }
  if (size[0] < 1 || size[1] < 1) {
    fail("Given input size: (", x.size(1), "x", x.size(2), "x", x.size(3), "). Calculated output size: (", x.size(1),
         "x", size[0], "x", size[1], "). Output size is too small");
  }
  return size;
}

// The gradient at the averages of x.
inline void check_averaged_gradient(const char* op, const Tensor& grad_out, const Tensor& x,
                                    const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride) {
  check_averaged(op, x);
  const std::array<int64_t, 2> size = check_average_pooling(op, x, kernel, stride);
  const int64_t shape[4] = {x.size(0), x.size(1), size[0], size[1]};
  check_device(op, "grad_out", grad_out, x);
  if (grad_out.scalar_type() != x.scalar_type()) {
    fail(op, ": grad_out is ", grad_out.scalar_type(), "; pass ", x.scalar_type());
  }
  bool fits = grad_out.dim() == 4;
  for (int64_t i = 0; fits && i < 4; ++i) fits = grad_out.size(i) == shape[i];
  if (!fits) {
    fail(op, ": grad_out has shape ", shape_of(grad_out), " but pooling x of shape ", shape_of(x), " gives [", shape[0],
         ", ", shape[1], ", ", shape[2], ", ", shape[3], "]; pass the gradient at that result");
  }
  check_layout(op, "grad_out", grad_out);
}

}  // namespace resnet_fused
