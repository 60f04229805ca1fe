// Argument errors of conv_norm_add_relu.
#pragma once

#include <functional>
#include <vector>

#include "common.h"

namespace resnet_fused {

// Of the convolution itself. `rounds`: whether the kernel takes 16-bit data too.
inline void check_conv_norm_add_relu(const char* op, const Tensor& x, const Tensor& weight,
                                     const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                     const std::vector<int64_t>& dilation, bool rounds = false) {
  check_data(op, "x", x);
  if (rounds && weight.scalar_type() != x.scalar_type()) {
    fail(op, ": got ", x.scalar_type(), " x and ", weight.scalar_type(), " weight; pass one dtype for both");
  }
  if (!rounds && (x.scalar_type() != stat_dtype(x.scalar_type()) || weight.scalar_type() != x.scalar_type())) {
    fail(op, ": got ", x.scalar_type(), " x and ", weight.scalar_type(), " weight; pass Float or Double for both");
  }
  check_device(op, "weight", weight, x);
  if (stride.size() != 2 || padding.size() != 2 || dilation.size() != 2) {
    fail(op, ": stride, padding and dilation have ", stride.size(), ", ", padding.size(), " and ", dilation.size(),
         " entries; pass two of each");
  }
  bool fits = weight.dim() == 4 && weight.size(1) == x.size(1);
  for (int64_t i = 0; fits && i < 2; ++i) {
    const int64_t reach = dilation[i] * (weight.size(2 + i) - 1) + 1;
    fits = stride[i] > 0 && padding[i] >= 0 && dilation[i] > 0 && x.size(2 + i) + 2 * padding[i] >= reach;
  }
  if (!fits) {
    fail(op, ": weight ", shape_of(weight), " does not fit x ", shape_of(x),
         "; pass a [K, C, R, S] weight without groups that lies within the padded image");
  }
  if (!weight.is_contiguous() && !is_channels_last(weight)) {
    fail(op, ": weight is neither contiguous nor channels_last; pass weight.contiguous()");
  }
}

// Of what is to hold a result of shape `sizes`.
inline void check_target(const char* op, const Tensor& out, const Tensor& x, const std::vector<int64_t>& sizes) {
  check_data(op, "out", out);
  check_device(op, "out", out, x);
  bool fits = out.scalar_type() == x.scalar_type();
  for (int64_t i = 0; i < 4; ++i) fits = fits && out.size(i) == sizes[i];
  if (!fits) {
    fail(op, ": out is ", out.scalar_type(), " of shape ", shape_of(out), " but the result is ", x.scalar_type(),
         " of [", sizes[0], ", ", sizes[1], ", ", sizes[2], ", ", sizes[3], "]; pass out of that dtype and shape");
  }
}

inline void check_apart(const char* op, const char* name, const Tensor& t, const Tensor& out) {
  const auto end = [](const Tensor& of) {
    return static_cast<const char*>(of.data_ptr()) + of.numel() * of.element_size();
  };
  const std::less<const void*> before;
  if (before(out.data_ptr(), end(t)) && before(t.data_ptr(), end(out))) {
    fail(op, ": ", name, " shares memory with out, which is written; pass one with memory of its own");
  }
}

// `out`: of the shape and dtype that results.
inline void check_behind_conv(const char* op, const Tensor& out, const OptionalTensor& bias, const OptionalTensor& mean,
                              const OptionalTensor& var, const OptionalTensor& gamma, const OptionalTensor& beta,
                              const OptionalTensor& residual) {
  check_pair(op, "mean", mean, "var", var, out);
  if (bias) check_vector(op, "bias", *bias, out);
  if (gamma) check_vector(op, "gamma", *gamma, out);
  if (beta) check_vector(op, "beta", *beta, out);
  if ((gamma || beta) && !mean) fail(op, ": got gamma or beta without mean; pass mean and var");
  if (residual) check_like(op, "residual", *residual, "the result", out);
}

}  // namespace resnet_fused
