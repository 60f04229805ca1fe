// What the 3x3 convolutions of dense blocks are made of where Winograd's transforms overflow, or spread what is not
// finite: their inputs written out, for ATen's convolutions.
#pragma once

#include "alloc.h"
#include "conv1x1_values.h"
#include "rows.h"

namespace resnet_fused::cpu {

// relu(scale*z + shift) as a tensor.
inline Tensor dense_activation(const Tensor& z, const Tensor& scale, const Tensor& shift) {
  Tensor out = empty_channels_last(z);
  const Shape shape(z);
  const int64_t C = shape.channels;
  parallel_rows(shape, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * C; i < end * C; i += C) {
      for (int64_t c = 0; c < C; ++c) {
        activate_lanes<float>(data<float>(out) + i + c, data<float>(z) + i + c, data<float>(scale) + c,
                              data<float>(shift) + c);
      }
    }
  });
  return out;
}

// grad + (b*y + d) as a tensor, where b is 0 without y.
inline Tensor dense_gradient(const Tensor& grad, const Tensor& y, const Tensor& b, const Tensor& d) {
  Tensor out = empty_channels_last(grad);
  const Shape shape(grad);
  const int64_t C = shape.channels, grad_pitch = pixel_pitch(grad), y_pitch = pixel_pitch(y);
  parallel_rows(shape, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float *from = data<float>(grad) + row * grad_pitch, *value = data<float>(y) + row * y_pitch;
      for (int64_t c = 0; c < C; ++c) {
        const float factor = data<float>(b)[c];
        data<float>(out)[row * C + c] = from[c] + ((factor == 0 ? 0 : value[c] * factor) + data<float>(d)[c]);
      }
    }
  });
  return out;
}

}  // namespace resnet_fused::cpu
