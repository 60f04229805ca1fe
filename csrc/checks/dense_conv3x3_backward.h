// Argument errors of dense_conv3x3_backward.
#pragma once

#include "dense.h"

namespace resnet_fused {

// What has gathered at a slice of the block's buffer.
struct DenseSlice {
  const Tensor &grad, &y, &b, &d;
};

inline void check_dense_conv3x3_backward(const DenseSlice& slice, const Tensor& z, const Tensor& weight,
                                         const Tensor& scale, const Tensor& shift, const Tensor& mean) {
  const char* op = "dense_conv3x3_backward";
  check_slice(op, "z", z);
  check_layout(op, "z", z);
  check_slice(op, "grad", slice.grad);
  const int64_t G = slice.grad.size(1), K = z.size(1);
  check_pixels(op, "grad", slice.grad, G, "z", z);
  check_pixels(op, "y", slice.y, G, "z", z);
  check_weight3x3(op, weight, G, K, z);
  if (!weight.is_contiguous() && !is_channels_last(weight)) {
    fail(op, ": weight of shape ", shape_of(weight), " is not dense; pass weight.contiguous()");
  }
  check_size(op, "b", slice.b, G, z);
  check_size(op, "d", slice.d, G, z);
  check_size(op, "scale", scale, K, z);
  check_size(op, "shift", shift, K, z);
  check_size(op, "mean", mean, K, z);
}

}  // namespace resnet_fused
