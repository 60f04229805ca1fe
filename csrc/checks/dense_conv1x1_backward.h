// Argument errors of dense_conv1x1_backward.
#pragma once

#include "dense.h"

namespace resnet_fused {

struct DenseGradient {
  const Tensor &g, &z, &a, &b, &d;
};
struct DenseInput {
  const Tensor &x, &weight, &scale, &shift, &mean;
};

inline void check_dense_conv1x1_backward(const Tensor& out, const OptionalTensor& grad, const DenseGradient& of,
                                         const DenseInput& input) {
  const char* op = "dense_conv1x1_backward";
  check_slice(op, "x", input.x);
  check_slice(op, "g", of.g);
  const Tensor& x = input.x;
  const int64_t C = x.size(1), K = of.g.size(1);
  check_pixels(op, "out", out, C, "x", x);
  check_apart(op, "x", x, out);
  if (grad) {
    check_pixels(op, "grad", *grad, C, "x", x);
    check_apart(op, "grad", *grad, out);
  }
  check_dense_pixels(op, "g", of.g, K, "x", x);
  check_dense_pixels(op, "z", of.z, K, "x", x);
  check_apart(op, "g", of.g, out);
  check_apart(op, "z", of.z, out);
  check_weight(op, "weight", input.weight, K, C, x);
  check_size(op, "a", of.a, K, x);
  check_size(op, "b", of.b, K, x);
  check_size(op, "d", of.d, K, x);
  check_size(op, "scale", input.scale, C, x);
  check_size(op, "shift", input.shift, C, x);
  check_size(op, "mean", input.mean, C, x);
}

}  // namespace resnet_fused
