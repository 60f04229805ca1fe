// Argument errors of conv1x1, and what those of the other 1x1 convolutions share.
#pragma once

#include <vector>

#include "parameters.h"

namespace resnet_fused {

inline void check_stride(const char* op, const char* name, const std::vector<int64_t>& stride) {
  if (stride.size() != 2) fail(op, ": ", name, " has ", stride.size(), " entries; pass two");
  if (stride[0] < 1 || stride[1] < 1) {
    fail(op, ": ", name, " is [", stride[0], ", ", stride[1], "]; pass two positive numbers");
  }
}

// A weight [outputs, inputs, 1, 1] whose rows lie side by side. A negative number: any.
inline void check_weight(const char* op, const char* name, const Tensor& weight, int64_t outputs, int64_t inputs,
                         const Tensor& data) {
  check_device(op, name, weight, data);
  if (weight.scalar_type() != data.scalar_type()) {
    fail(op, ": ", name, " is ", weight.scalar_type(), " but the activations are ", data.scalar_type(),
         "; pass one dtype");
  }
  const bool fits = weight.dim() == 4 && weight.size(2) == 1 && weight.size(3) == 1 &&
                    (outputs < 0 || weight.size(0) == outputs) && (inputs < 0 || weight.size(1) == inputs);
  if (!fits) {
    const auto size = [](int64_t n, const char* any) { return n < 0 ? std::string(any) : std::to_string(n); };
    fail(op, ": ", name, " has shape ", shape_of(weight), "; pass [", size(outputs, "K"), ", ", size(inputs, "C"),
         ", 1, 1]");
  }
  if (!is_channels_last(weight)) fail(op, ": ", name, " is not contiguous; pass ", name, ".contiguous()");
}

// The loops for one dtype.
inline void check_float(const char* op, const char* name, const Tensor& t) {
  if (t.scalar_type() != ScalarType::Float) fail(op, ": ", name, " is ", t.scalar_type(), "; pass Float on the CPU");
}

// Float, or where the kernel takes 16-bit data too (`rounds`) the dtype of the other activations.
inline void check_dtype(const char* op, const char* name, const Tensor& t, const Tensor& data, bool rounds) {
  if (!rounds) return check_float(op, name, t);
  if (t.scalar_type() != data.scalar_type()) {
    fail(op, ": ", name, " is ", t.scalar_type(), " but the activations are ", data.scalar_type(), "; pass one dtype");
  }
}

// `rounds`: whether the kernel takes 16-bit data too.
inline void check_conv1x1(const Tensor& x, const Tensor& weight, const OptionalTensor& x_scale,
                          const OptionalTensor& x_shift, const std::vector<int64_t>& stride,
                          const OptionalTensor& gamma, const OptionalTensor& beta, std::optional<double> eps,
                          bool rounds = false) {
  const char* op = "conv1x1";
  check_data(op, "x", x);
  if (!rounds) check_float(op, "x", x);
  check_weight(op, "weight", weight, -1, x.size(1), x);
  check_pair(op, "x_scale", x_scale, "x_shift", x_shift, x);
  check_stride(op, "stride", stride);
  check_parameters(op, gamma, beta, eps, weight.size(0), x);
}

}  // namespace resnet_fused
