// What the ops that pool check alike; what stock refuses too, in stock's words.
#pragma once

#include <array>
#include <vector>

#include "common.h"

namespace resnet_fused {

// What stock's max_pool2d refuses, in its words. Returns height and width of the result.
inline std::array<int64_t, 2> check_pooling(const char* op, const Tensor& z, const std::vector<int64_t>& kernel,
                                            const std::vector<int64_t>& stride, const std::vector<int64_t>& padding) {
  if (kernel.size() != 2 || stride.size() != 2 || padding.size() != 2) {
    fail(op, ": kernel, stride and padding have ", kernel.size(), ", ", stride.size(), " and ", padding.size(),
         " entries; pass two of each");
  }
  for (int i = 0; i < 2; ++i) {
    if (stride[i] == 0) fail("stride should not be zero");
    if (padding[i] < 0) fail("pad must be non-negative, but got pad: ", padding[i]);
    if (padding[i] > kernel[i] / 2) {
      fail("pad should be at most half of effective kernel size, but got pad=", padding[i], ", kernel_size=", kernel[i],
           " and dilation=1");
    }
  }
  if (kernel[0] < 1 || kernel[1] < 1) {
    fail("kernel size should be greater than zero, but got kH: ", kernel[0], " kW: ", kernel[1]);
  }
  if (stride[0] < 1 || stride[1] < 1) {
    fail("stride should be greater than zero, but got dH: ", stride[0], " dW: ", stride[1]);
  }
  if (kernel[0] > 255 || kernel[1] > 255 || kernel[0] * kernel[1] > 255) {
    fail("norm_relu_pool: kernel is [", kernel[0], ", ", kernel[1], "]; pass one of at most 255 places");
  }
  if (z.size(1) == 0 || z.size(2) == 0 || z.size(3) == 0) {
    fail("Expected 3D or 4D (batch mode) tensor with optional 0 dim batch size for input, but got:", shape_of(z));
  }
  std::array<int64_t, 2> size;
  for (int i = 0; i < 2; ++i) {
    const int64_t room = z.size(2 + i) + 2 * padding[i] - kernel[i];
    size[i] = room < 0 ? 0 : room / stride[i] + 1;
  }
  if (size[0] < 1 || size[1] < 1) {
    fail("Given input size: (", z.size(1), "x", z.size(2), "x", z.size(3), "). Calculated output size: (", z.size(1),
         "x", size[0], "x", size[1], "). Output size is too small");
  }
  return size;
}

// Two tensors of the shape of the pooled z: the gradient there, and the uint8 places that norm_relu_pool gave.
inline void check_pooled_gradient(const char* op, const Tensor& grad_out, const Tensor& index, const Tensor& z,
                                  const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                                  const std::vector<int64_t>& padding) {
  check_data(op, "z", z);
  const std::array<int64_t, 2> size = check_pooling(op, z, kernel, stride, padding);
  const int64_t shape[4] = {z.size(0), z.size(1), size[0], size[1]};
  for (const bool is_index : {false, true}) {
    const Tensor& t = is_index ? index : grad_out;
    const char* name = is_index ? "index" : "grad_out";
    check_device(op, name, t, z);
    const ScalarType dtype = is_index ? ScalarType::Byte : z.scalar_type();
    if (t.scalar_type() != dtype) fail(op, ": ", name, " is ", t.scalar_type(), "; pass ", dtype);
    bool fits = t.dim() == 4;
    for (int64_t i = 0; fits && i < 4; ++i) fits = t.size(i) == shape[i];
    if (!fits) {
      fail(op, ": ", name, " has shape ", shape_of(t), " but pooling z of shape ", shape_of(z), " gives [", shape[0],
           ", ", shape[1], ", ", shape[2], ", ", shape[3], "]; pass ", is_index ? "what came with" : "the gradient at",
           " that result");
    }
    check_layout(op, name, t);
  }
}

}  // namespace resnet_fused
