// The 1x1 convolutions of the CPU in bfloat16, for machines whose instructions multiply it: what the ops' own files
// call for tensors of this dtype once they have checked them, has_bf16() among that.
#pragma once

#include <vector>

#include "alloc.h"
#include "rows.h"

namespace resnet_fused::cpu {

// Fills z, [N, K, h, w], and with `mean` and `m2`, [K] each, its statistics.
void convolve1x1_bf16(const Tensor& x, const Tensor& weight, const OptionalTensor& x_scale,
                      const OptionalTensor& x_shift, const std::vector<int64_t>& stride, const Tensor& z, float* mean,
                      float* m2);

// The lazy gradient of an op's arguments.
struct Conv1x1GradientArguments {
  const Tensor& g;
  const OptionalTensor &mask, &z, &a, &b, &d, &scale, &shift, &sample_factor;
};

// What else conv1x1_dgrad takes.
struct Conv1x1InputArguments {
  const OptionalTensor &weight, &x, &x_scale, &x_shift, &x_mean, &coupling, &constant, &residual, &residual_mask;
  const std::vector<int64_t>&residual_stride, &x_stride;
};

// What is filled; of each only what is asked for.
struct Conv1x1GradientResults {
  const Tensor* grad_x = nullptr;                                  // [N, C, H, W]
  const Tensor *grad_weight = nullptr, *rounded_weight = nullptr;  // [K, C] float32, bfloat16
  float *sum_g = nullptr, *sum_gx = nullptr, *sum_dz = nullptr;    // [C], [C], [K]
};

void dgrad1x1_bf16(const Conv1x1GradientArguments& gradient, const Conv1x1InputArguments& arguments,
                   const Conv1x1GradientResults& results);
void wgrad1x1_bf16(const Conv1x1GradientArguments& gradient, const Tensor& x, const OptionalTensor& x_scale,
                   const OptionalTensor& x_shift, const std::vector<int64_t>& stride,
                   const Conv1x1GradientResults& results);

}  // namespace resnet_fused::cpu
