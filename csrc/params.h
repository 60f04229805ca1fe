// Arguments of the CUDA launches, one struct per op; no torch header, so that csrc/cuda/kernels compiles alone.
// Activations are row-major [rows, channels] matrices (channels_last); absent tensors are null pointers.
#pragma once

#include <cstdint>

namespace resnet_fused {

struct Extent {
  int64_t rows;             // N*H*W
  int64_t channels;         // C
  int64_t rows_per_sample;  // H*W
};

struct NormAddReluParams {
  Extent extent;
  const void* z;                // [rows, C]
  const float* scale;           // [C]
  const float* shift;           // [C]
  const void* residual;         // [rows, C] or null
  const float* residual_scale;  // [C] or null
  const float* residual_shift;  // [C] or null
  const float* sample_factor;   // [N] or null
  void* out;                    // [rows, C]
  uint8_t* mask;                // [rows, ceil(C/8)] or null
  bool relu;
};

struct NormAddReluBackwardParams {
  Extent extent;
  const void* grad_out;        // [rows, C]
  const void* z;               // [rows, C] or null
  const float* mean;           // [C], null without z
  const float* scale;          // [C] or null: no recomputed mask
  const float* shift;          // [C] or null
  const uint8_t* mask_bits;    // [rows, ceil(C/8)] or null
  const void* mask_output;     // [rows, C] or null
  const void* residual;        // [rows, C] or null
  const float* residual_mean;  // [C], null without residual
  const float* sample_factor;  // [N] or null
  void* g;                     // [rows, C] or null
  float* partial;              // scratch, partial_floats() of it
  float* sums[4];              // [C] each: sum_g, sum_gz, residual_sum_g, residual_sum_gz; null where absent
};

// A convolution [n, h, w, c] -> [n, p, q, k] without groups. All tensors, and x with its padding, have less than 2^31
// elements, a padded image less than 2^15 pixels to a side.
struct ConvGeometry {
  int n, h, w, c;
  int k, r, s;
  int p, q;
  int stride_h, stride_w;
  int padding_h, padding_w;
  int dilation_h, dilation_w;
};

struct ConvNormAddReluParams {
  ConvGeometry geometry;
  const void* x;         // [n, h, w, c]
  const void* weight;    // [k, r, s, c]
  const float* bias;     // [k] or null
  const float* mean;     // [k] or null: no batch norm
  const float* var;      // [k], null without mean
  const float* gamma;    // [k] or null
  const float* beta;     // [k] or null
  float eps;             //
  const void* residual;  // [n, p, q, k] or null; may be `out`
  void* out;             // [n, p, q, k]
  bool relu;
};

}  // namespace resnet_fused
