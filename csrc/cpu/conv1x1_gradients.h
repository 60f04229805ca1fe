// The backward of a 1x1 convolution, cut into units of work: what conv1x1_dgrad and conv1x1_wgrad share.
#pragma once

#include <vector>

#include "alloc.h"
#include "conv1x1_backward_stages.h"
#include "rows.h"

namespace resnet_fused::cpu {

// Sums over all rows; of each only what is asked for.
struct BackwardResults {
  float* grad_weight = nullptr;                                  // [K, C]
  float *sum_g = nullptr, *sum_gx = nullptr, *sum_dz = nullptr;  // [C], [C], [K]
};

// Fills p.grad_x and what `results` points to. The sums are of chunks of rows, which depend on the shape alone, and are
// added up in their order.
void run_backward(Conv1x1Backward p, const BackwardResults& results);

// The lazy gradient of an op's arguments. `ones`: filled where a is absent.
inline Gradient gradient_of(const Tensor& g, const OptionalTensor& mask, const OptionalTensor& z,
                            const OptionalTensor& a, const OptionalTensor& b, const OptionalTensor& d,
                            const OptionalTensor& scale, const OptionalTensor& shift,
                            const OptionalTensor& sample_factor, std::vector<float>& ones) {
  if (!a) ones.assign(g.size(1), 1.0f);
  return {
      data<float>(g),       data<float>(z),     a ? data<float>(a) : ones.data(), data<float>(b),      data<float>(d),
      data<float>(scale),   data<float>(shift), data<float>(sample_factor),       data<uint8_t>(mask), g.size(1),
      g.size(2) * g.size(3)};
}

}  // namespace resnet_fused::cpu
