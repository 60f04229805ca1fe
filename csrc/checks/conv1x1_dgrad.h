// Argument errors of conv1x1_dgrad, beyond those of its lazy gradient.
#pragma once

#include "conv1x1_gradient.h"

namespace resnet_fused {

struct DgradInput {
  const OptionalTensor &x, &scale, &shift, &mean, &rstd;
  const std::vector<int64_t>& stride;
};
struct DgradAdded {
  const OptionalTensor &coupling, &constant, &residual, &mask;
  const std::vector<int64_t>& stride;
};

// `rounds`: whether the kernel takes 16-bit data too.
inline void check_conv1x1_dgrad(const Tensor& g, const OptionalTensor& weight, const DgradInput& input,
                                const DgradAdded& added, bool weight_grad, bool rounds = false) {
  const char* op = "conv1x1_dgrad";
  if (weight) check_weight(op, "weight", *weight, g.size(1), -1, g);
  const int64_t C = weight ? weight->size(1) : g.size(1);
  const bool reads = input.scale || added.coupling || weight_grad;
  if (reads && !input.x) fail(op, ": got no x; pass it with x_scale, coupling or weight_grad");
  if (input.x) check_input(op, *input.x, C, input.stride, g, rounds);
  if (input.scale.has_value() != input.shift.has_value()) fail(op, ": pass x_scale and x_shift, or neither");
  if (input.scale.has_value() != input.mean.has_value()) fail(op, ": pass x_scale and x_mean, or neither");
  if (input.rstd && !input.mean) fail(op, ": got x_rstd without x_mean; pass x_mean too");
  for (const auto& [name, t] : {std::pair{"x_scale", &input.scale},
                                {"x_shift", &input.shift},
                                {"x_mean", &input.mean},
                                {"x_rstd", &input.rstd},
                                {"constant", &added.constant}}) {
    check_channels(op, name, *t, C, g);
  }
  if (added.coupling) check_weight(op, "coupling", *added.coupling, C, C, g);
  if (weight_grad && !weight) fail(op, ": weight_grad needs weight");
  check_stride(op, "residual_stride", added.stride);
  if (!added.residual) return;
  if (input.scale) fail(op, ": got residual and x_scale; pass one of them");
  const Tensor& r = *added.residual;
  check_data(op, "residual", r);
  check_dtype(op, "residual", r, g, rounds);
  check_device(op, "residual", r, g);
  const auto left = [&](int64_t i) { return (g.size(i) + added.stride[i - 2] - 1) / added.stride[i - 2]; };
  if (r.size(0) != g.size(0) || r.size(1) != C || r.size(2) != left(2) || r.size(3) != left(3)) {
    fail(op, ": residual has shape ", shape_of(r), "; pass [", g.size(0), ", ", C, ", ", left(2), ", ", left(3), "]");
  }
  check_bits(op, "residual_mask", added.mask, r.size(0) * r.size(2) * r.size(3), C, g);
}

}  // namespace resnet_fused
