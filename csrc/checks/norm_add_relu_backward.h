// Argument errors of norm_add_relu_backward.
#pragma once

#include "common.h"

namespace resnet_fused {

// A tensor and the vector that is subtracted from it in its sum.
inline void check_centred(const char* op, const char* name, const OptionalTensor& t, const char* mean_name,
                          const OptionalTensor& mean, const Tensor& data) {
  if (t) check_like(op, name, *t, "grad_out", data);
  if (t.has_value() != mean.has_value()) {
    fail(op, ": got ", t ? name : mean_name, " without ", t ? mean_name : name, "; pass both or neither");
  }
  if (mean) check_vector(op, mean_name, *mean, data);
}

inline void check_mask(const char* op, const Tensor& mask, const Tensor& data) {
  if (mask.scalar_type() != ScalarType::Byte) return check_like(op, "mask", mask, "grad_out", data);
  check_device(op, "mask", mask, data);
  const int64_t rows = data.size(0) * data.size(2) * data.size(3), bytes = (data.size(1) + 7) / 8;
  if (mask.dim() != 2 || mask.size(0) != rows || mask.size(1) != bytes || !mask.is_contiguous()) {
    fail(op, ": mask has shape ", shape_of(mask), "; pass the contiguous [", rows, ", ", bytes,
         "] mask that norm_add_relu emitted for activations of shape ", shape_of(data));
  }
}

inline void check_norm_add_relu_backward(const Tensor& grad_out, const OptionalTensor& z, const OptionalTensor& mean,
                                         const OptionalTensor& scale, const OptionalTensor& shift,
                                         const OptionalTensor& mask, const OptionalTensor& residual,
                                         const OptionalTensor& residual_mean, const OptionalTensor& sample_factor,
                                         bool relu) {
  const char* op = "norm_add_relu_backward";
  check_data(op, "grad_out", grad_out);
  check_centred(op, "z", z, "mean", mean, grad_out);
  check_pair(op, "scale", scale, "shift", shift, grad_out);
  if (mask) check_mask(op, *mask, grad_out);
  if (relu && !mask && !(z && scale)) fail(op, ": with relu, pass mask, or z, scale and shift to recompute it from");
  check_centred(op, "residual", residual, "residual_mean", residual_mean, grad_out);
  check_factor(op, sample_factor, grad_out);
}

}  // namespace resnet_fused
