// A convolution of few pixels with what follows it on the sums, in float or double.
#pragma once

#include <cstdint>

#include "behind_conv.h"

namespace resnet_fused::cpu {

// x: [N, H, W, C]; the weight: K rows, each [C, R, S] or, with `taps_outside`, [R, S, C]; out: [N, P, Q, K].
struct ConvShape {
  int64_t N, C, H, W, K, R, S, P, Q, stride[2], padding[2], dilation[2];
  bool taps_outside;

  int64_t pixels() const { return N * P * Q; }
};

template <class A>
void convolve_few_pixels(A* out, const A* x, const A* weight, const ConvShape& shape, const Behind<A>& behind);

extern template void convolve_few_pixels(float*, const float*, const float*, const ConvShape&, const Behind<float>&);
extern template void convolve_few_pixels(double*, const double*, const double*, const ConvShape&,
                                         const Behind<double>&);

}  // namespace resnet_fused::cpu
