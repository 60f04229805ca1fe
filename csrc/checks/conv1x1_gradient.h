// What the backward of a 1x1 convolution checks of a lazy gradient, of its input, and of what is added.
#pragma once

#include "conv1x1.h"

namespace resnet_fused {

// Bits of a [N, C, H, W] tensor.
inline void check_bits(const char* op, const char* name, const OptionalTensor& mask, int64_t rows, int64_t channels,
                       const Tensor& data) {
  if (!mask) return;
  check_device(op, name, *mask, data);
  const int64_t bytes = (channels + 7) / 8;
  const bool fits = mask->scalar_type() == ScalarType::Byte && mask->dim() == 2 && mask->size(0) == rows &&
                    mask->size(1) == bytes && mask->is_contiguous();
  if (!fits) {
    fail(op, ": ", name, " is ", mask->scalar_type(), " of shape ", shape_of(*mask), "; pass the contiguous [", rows,
         ", ", bytes, "] bits that norm_add_relu emits");
  }
}

// `rounds`: whether the kernel takes 16-bit data too.
inline void check_gradient(const char* op, const Tensor& g, const OptionalTensor& mask, const OptionalTensor& z,
                           const OptionalTensor& a, const OptionalTensor& b, const OptionalTensor& d,
                           const OptionalTensor& scale, const OptionalTensor& shift,
                           const OptionalTensor& sample_factor, bool rounds = false) {
  check_data(op, "g", g);
  if (!rounds) check_float(op, "g", g);
  check_bits(op, "mask", mask, g.size(0) * g.size(2) * g.size(3), g.size(1), g);
  if (z) check_like(op, "z", *z, "g", g);
  if (a) check_vector(op, "a", *a, g);
  check_pair(op, "b", b, "d", d, g);
  check_pair(op, "scale", scale, "shift", shift, g);
  if (!z && (b || scale)) fail(op, ": got ", b ? "b" : "scale", " without z; pass z too");
  check_factor(op, sample_factor, g);
}

inline void check_channels(const char* op, const char* name, const OptionalTensor& t, int64_t channels,
                           const Tensor& data) {
  if (!t) return;
  check_device(op, name, *t, data);
  if (t->dim() != 1 || t->size(0) != channels || t->scalar_type() != ScalarType::Float || !t->is_contiguous()) {
    fail(op, ": ", name, " is ", t->scalar_type(), " of shape ", shape_of(*t), "; pass a contiguous [", channels,
         "] Float vector");
  }
}

// x, of which the convolution read the pixels of a stride, as many as g has.
inline void check_input(const char* op, const Tensor& x, int64_t channels, const std::vector<int64_t>& stride,
                        const Tensor& g, bool rounds = false) {
  check_data(op, "x", x);
  check_dtype(op, "x", x, g, rounds);
  check_device(op, "x", x, g);
  check_stride(op, "the stride of x", stride);
  const auto left = [&](int64_t i) { return (x.size(i) + stride[i - 2] - 1) / stride[i - 2]; };
  if (x.size(0) != g.size(0) || x.size(1) != channels || left(2) != g.size(2) || left(3) != g.size(3)) {
    fail(op, ": x has shape ", shape_of(x), " and stride [", stride[0], ", ", stride[1], "]; pass one of ", channels,
         " channels whose strided pixels are those of g, of shape ", shape_of(g));
  }
}

}  // namespace resnet_fused
