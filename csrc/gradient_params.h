// Arguments of the CUDA launches of a 1x1 convolution's gradients; see params.h.
#pragma once

#include "params.h"

namespace resnet_fused {

// dz = round(sample_factor*a*keep*g + b*z + d), see resnet_fused/ops/lazy.py. keep is a bit of `mask`, else
// not (scale*z + shift <= 0), else 1. Tensors have less than 2^31 elements.
struct LazyGradient {
  int rows, channels;  // n*p*q and k
  int rows_per_sample;
  const void* g;               // [rows, k]
  const void* z;               // [rows, k] or null: neither b nor scale
  const uint8_t* mask;         // [rows, ceil(k/8)] or null
  const float *a, *b, *d;      // [k] each or null; b and d both or neither
  const float *scale, *shift;  // [k] each, both or neither; neither with `mask`
  const float* sample_factor;  // [n] or null
};

// relu(scale*x + shift), or x, at the pixels that a strided 1x1 convolution reads.
struct LazyInput {
  int rows, channels;  // n*p*q and c
  int h, w, p, q;      // x is [n, h, w, c], its pixels at the strides [n, p, q, c]
  int stride_h, stride_w;
  const void* x;               // null where nobody reads it
  const float *scale, *shift;  // [c] each, both or neither
};

struct Conv1x1WgradParams {
  LazyGradient gradient;
  LazyInput input;
  float* partial;     // [splits, k*c + k] scratch: the weight's gradient of each split of the rows, then the sum of dz
  void* grad_weight;  // [k, c] in float32, or in the dtype of the data if `rounded`
  float* sum_g;       // [k]
  bool rounded;
};

// Partial sums that are added on the way of another launch.
struct SplitSums {
  const float* partial;  // [splits, stride] or null: there are none
  int splits, stride;
  int size;   // of them, the first so many of each split
  void* sum;  // [size] in the dtype of the data
};

// What the sums of a gradient before a batch norm become.
struct GradientSums {
  float* sum_g;               // [c]
  float* sum_gx;              // [c] or null
  BnCoefficientsParams norm;  // of `channels`; its sums are these, b null: what follows from them is not asked for
};

struct Conv1x1DgradParams {
  LazyGradient gradient;
  LazyInput input;               // with a scale grad_x is masked by the ReLU, and summed
  const void* weight;            // [k, c] or null: dz is the product, and k is c
  const void* coupling;          // [c, c] or null
  const float* constant;         // [c] or null
  const float* x_mean;           // [c], null without input.scale
  const void* residual;          // [n, ceil(p/stride), ceil(q/stride), c] or null
  const uint8_t* residual_mask;  // bits of residual, or null
  int residual_stride_h, residual_stride_w;
  void* grad_x;           // [rows, c]
  SplitSums weight_grad;  // of the weight's gradient
  float* partial;         // scratch, conv1x1_dgrad_partial_floats() of it; null: no sums
  GradientSums found;
};

}  // namespace resnet_fused
