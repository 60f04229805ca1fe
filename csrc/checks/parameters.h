// What the ops that take statistics check of batch norm's parameters.
#pragma once

#include "common.h"

namespace resnet_fused {

inline void check_parameter(const char* op, const char* name, const OptionalTensor& t, int64_t channels,
                            const Tensor& data) {
  if (!t) return;
  check_device(op, name, *t, data);
  const ScalarType dtype = t->scalar_type();
  const bool floating = dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
                        dtype == ScalarType::Half;
  if (t->dim() != 1 || t->size(0) != channels || !floating) {
    fail(op, ": ", name, " is ", dtype, " of shape ", shape_of(*t), "; pass a floating [", channels, "] vector");
  }
}

inline void check_parameters(const char* op, const OptionalTensor& gamma, const OptionalTensor& beta,
                             std::optional<double> eps, int64_t channels, const Tensor& data) {
  if (!eps && (gamma || beta)) fail(op, ": got gamma or beta without eps; pass eps too");
  check_parameter(op, "gamma", gamma, channels, data);
  check_parameter(op, "beta", beta, channels, data);
}

}  // namespace resnet_fused
