// A 1x1 convolution with what follows it on the sums, as products of rows with panels of the weight.
#pragma once

#include "behind_conv.h"
#include "pixels.h"

namespace resnet_fused::cpu {

struct Pointwise {
  const float *x, *weight;  // [.., C], [K, C]
  float* out;               // [pixels.rows, K]; may be the residual
  int64_t C, K;
  Pixels pixels;  // of x that are read
  Behind<float> behind;
};

void convolve_pointwise(const Pointwise& p);

}  // namespace resnet_fused::cpu
