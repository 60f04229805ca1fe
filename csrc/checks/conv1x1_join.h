// Argument errors of conv1x1_join.
#pragma once

#include "conv1x1_gradient.h"

namespace resnet_fused {

struct JoinResidual {
  const OptionalTensor &residual, &scale, &shift;
};
struct JoinProjection {
  const OptionalTensor &x, &weight, &scale, &shift;
  const std::vector<int64_t>& stride;
};

// A tensor of the shape and the layout of the output.
inline void check_joined(const char* op, const Tensor& t, const Tensor& x, int64_t K, bool rounds) {
  check_data(op, "residual", t);
  check_dtype(op, "residual", t, x, rounds);
  check_device(op, "residual", t, x);
  if (t.size(0) != x.size(0) || t.size(1) != K || t.size(2) != x.size(2) || t.size(3) != x.size(3)) {
    fail(op, ": residual has shape ", shape_of(t), "; pass [", x.size(0), ", ", K, ", ", x.size(2), ", ", x.size(3),
         "]");
  }
}

// `rounds`: whether the kernel takes 16-bit data too.
inline void check_conv1x1_join(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift,
                               const OptionalTensor& x_scale, const OptionalTensor& x_shift, const JoinResidual& other,
                               const JoinProjection& projection, const OptionalTensor& sample_factor,
                               bool rounds = false) {
  const char* op = "conv1x1_join";
  check_data(op, "x", x);
  if (!rounds) check_float(op, "x", x);
  check_weight(op, "weight", weight, -1, x.size(1), x);
  const int64_t K = weight.size(0);
  check_channels(op, "scale", scale, K, x);
  check_channels(op, "shift", shift, K, x);
  check_pair(op, "x_scale", x_scale, "x_shift", x_shift, x);
  check_factor(op, sample_factor, x);
  if (other.residual) check_joined(op, *other.residual, x, K, rounds);
  if (other.scale.has_value() != other.shift.has_value() || (other.scale && !other.residual)) {
    fail(op, ": pass residual_scale and residual_shift with a residual, or neither");
  }
  check_channels(op, "residual_scale", other.scale, K, x);
  check_channels(op, "residual_shift", other.shift, K, x);
  const bool wanted = projection.x.has_value();
  if (wanted != projection.weight.has_value() || wanted != projection.scale.has_value() ||
      wanted != projection.shift.has_value()) {
    fail(op, ": pass x2, weight2, scale2 and shift2, or none of them");
  }
  if (!wanted) return;
  check_input(op, *projection.x, projection.x->size(1), projection.stride, x, rounds);
  check_weight(op, "weight2", *projection.weight, K, projection.x->size(1), x);
  check_channels(op, "scale2", projection.scale, K, x);
  check_channels(op, "shift2", projection.shift, K, x);
}

}  // namespace resnet_fused
