// The sizes of a convolution as its kernels count them, or an error; and its weight as they read it.
#pragma once

#include <vector>

#include "common.h"

namespace resnet_fused::cuda {

constexpr int64_t kMostElements = int64_t(1) << 31, kMostPixels = 1 << 15;

// The kernels count in 32 bits, and in 16 along a side of an image.
inline ConvGeometry geometry_of(const char* op, const Tensor& x, const Tensor& weight,
                                const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                const std::vector<int64_t>& dilation) {
  int64_t padded[2], outputs[2];
  for (int i = 0; i < 2; ++i) {
    padded[i] = x.size(2 + i) + 2 * padding[i];
    outputs[i] = (padded[i] - dilation[i] * (weight.size(2 + i) - 1) - 1) / stride[i] + 1;
    if (padded[i] >= kMostPixels || stride[i] >= kMostPixels || dilation[i] >= kMostPixels) {
      fail(op, ": x of shape ", shape_of(x), " has ", padded[i], " padded pixels to a side (stride ", stride[i],
           ", dilation ", dilation[i], "); pass less than ", kMostPixels, ", or use another backend");
    }
  }
  const int64_t read = x.size(0) * x.size(1) * padded[0] * padded[1];
  const int64_t written = x.size(0) * weight.size(0) * outputs[0] * outputs[1];
  if (read >= kMostElements || written >= kMostElements || weight.numel() >= kMostElements) {
    fail(op, ": x of shape ", shape_of(x), " with its padding, weight ", shape_of(weight),
         " or the result has 2^31 elements or more; pass a smaller batch, or use another backend");
  }
  const auto i = [](int64_t value) { return static_cast<int>(value); };
  return {i(x.size(0)),      i(x.size(2)),      i(x.size(3)),  i(x.size(1)),   i(weight.size(0)),
          i(weight.size(2)), i(weight.size(3)), i(outputs[0]), i(outputs[1]),  i(stride[0]),
          i(stride[1]),      i(padding[0]),     i(padding[1]), i(dilation[0]), i(dilation[1])};
}

// As ATen's convolutions do: a contiguous weight of several taps is copied into the activations' layout.
inline Tensor in_rows(const Tensor& weight) {
  return is_channels_last(weight) ? weight
                                  : torch::stable::contiguous(weight, torch::headeronly::MemoryFormat::ChannelsLast);
}

}  // namespace resnet_fused::cuda
