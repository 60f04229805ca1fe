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

// A parameter of batch norm: [C], the user's, of any floating dtype and at any stride.
enum class ParameterType { kFloat, kDouble, kHalf, kBFloat16 };
struct NormParameter {
  const void* data;  // null: absent
  int64_t stride;
  ParameterType type;
};

// What batch norm's forward makes of statistics, see resnet_fused/ops/bn_affine.py.
struct AffineParams {
  NormParameter gamma, beta;
  float eps;
  float *var, *rstd, *scale, *shift, *centre;  // [C] each
};

// Where an op that takes statistics stores them.
struct StatisticsParams {
  int64_t rows, channels;  // they are of [rows, C]
  float* mean;             // [C]
  float* m2;               // [C] or null: `affine` in its place
  AffineParams affine;
};

struct BnStatsParams {
  Extent extent;
  const void* z;   // [rows, C]
  float* partial;  // scratch, bn_stats_partial_floats() of it
  StatisticsParams found;
};

struct BnAffineParams {
  int64_t rows, channels;
  const float* mean;  // [C]
  const float* m2;    // [C]
  AffineParams affine;
};

struct BnCoefficientsParams {
  int64_t rows, channels;
  const float *sum_g, *sum_gz, *mean, *rstd, *scale;  // [C] each
  float *b, *d, *grad_gamma;                          // [C] each
};

struct LazyGradApplyParams {
  Extent extent;
  const void* g;               // [rows, C]; may be `dz`
  const void* z;               // [rows, C]; null where neither b nor scale is there
  const float* a;              // [C] or null: 1
  const float* b;              // [C] or null
  const float* d;              // [C], null without b
  const float* scale;          // [C] or null: no recomputed mask
  const float* shift;          // [C], null without scale
  const float* sample_factor;  // [N] or null
  const void* residual;        // [rows, C] or null
  const uint8_t* mask_bits;    // [rows, ceil(C/8)] or null
  void* dz;                    // [rows, C]
};

// Windows along the height or the width: window o covers [o*stride - padding, o*stride - padding + kernel).
struct PoolAxis {
  int size, windows;
  int kernel, stride, padding;
};

struct PoolGeometry {
  int64_t samples, channels;
  PoolAxis h, w;
};

struct NormReluPoolParams {
  PoolGeometry geometry;
  const void* z;       // [n, h, w, C]
  const float* scale;  // [C]
  const float* shift;  // [C]
  void* out;           // [n, windows, C]
  uint8_t* index;      // [n, windows, C]
};

struct NormReluPoolBackwardParams {
  PoolGeometry geometry;
  const void* grad_out;  // [n, windows, C]
  const uint8_t* index;  // [n, windows, C]
  const void* z;         // [n, h, w, C]
  const float* mean;     // [C]
  const float* scale;    // [C]
  const float* shift;    // [C]
  float* partial;        // scratch, pool_partial_floats() of it
  float* sums[2];        // [C] each: sum_g, sum_gz
};

struct NormReluPoolApplyParams {
  PoolGeometry geometry;
  const void* grad_out;  // [n, windows, C]
  const uint8_t* index;  // [n, windows, C]
  const void* z;         // [n, h, w, C]
  const float* a;        // [C]
  const float* b;        // [C] or null
  const float* d;        // [C], null without b
  const float* scale;    // [C]
  const float* shift;    // [C]
  void* dz;              // [n, h, w, C]
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

// What follows a convolution in evaluation: its bias, and batch norm with running statistics.
struct RunningNorm {
  const float* bias;   // [k] or null
  const float* mean;   // [k] or null: no batch norm
  const float* var;    // [k], null without mean
  const float* gamma;  // [k] or null
  const float* beta;   // [k] or null
  float eps;           //
};

struct ConvNormAddReluParams {
  ConvGeometry geometry;
  const void* x;         // [n, h, w, c]
  const void* weight;    // [k, r, s, c]
  RunningNorm norm;      //
  const void* residual;  // [n, p, q, k] or null; may be `out`
  void* out;             // [n, p, q, k]
  bool relu;
  const float* scale = nullptr;          // [k] or null: scale and shift are made of `norm`
  const float* shift = nullptr;          // [k], null without scale
  const float* sample_factor = nullptr;  // [n] or null
  uint8_t* mask = nullptr;               // [n*p*q, ceil(k/8)] or null
};

struct Conv1x1Params {
  ConvGeometry geometry;
  const void* x;           // [n, h, w, c]
  const float* x_scale;    // [c] or null
  const float* x_shift;    // [c], null without x_scale
  const void* weight;      // [k, r, s, c]
  void* z;                 // [n, p, q, k]
  float* partial;          // scratch, conv1x1_partial_floats() of it; null: no statistics
  StatisticsParams found;  // of z; its mean null: none are asked for
};

struct Conv1x1JoinParams {
  ConvGeometry geometry;       // of x
  const void* x;               // [n, h, w, c]
  const float* x_scale;        // [c] or null
  const float* x_shift;        // [c], null without x_scale
  const void* weight;          // [k, c]
  const float* vectors[6];     // [k] each or null: scale, shift, residual_scale, residual_shift, scale2, shift2
  const void* residual;        // [n, p, q, k] or null
  bool projects;               // whether the following are there
  ConvGeometry projection;     // of x2, with the result of `geometry`
  const void* x2;              // [n, h2, w2, c2]
  const void* weight2;         // [k, c2]
  const float* sample_factor;  // [n] or null
  void* out;                   // [n, p, q, k]
  uint8_t* mask;               // [n*p*q, ceil(k/8)] or null
  bool relu;
  bool makes_vectors;    // whether scale and shift, and those of x2, are made of the following
  RunningNorm norms[2];  // of x and of x2
};

// The pixels [::stride_h, ::stride_w] of images, `rows` times `columns` of each.
struct PixelGrid {
  int samples, h, w;
  int rows, columns;
  int stride_h, stride_w;
};

struct GramParams {
  PixelGrid grid;       // less than 2^31 elements in all
  int channels;         // C
  const void* a;        // [samples, h, w, C]
  const float* centre;  // [C]
  const float* scale;   // [C] or null
  const float* shift;   // [C], null without scale
  float* partial;       // scratch, gram_partial_floats() of it
  float* gram;          // [C, C]
  float* total;         // [C]
};

struct GramNormParams {
  int outputs, channels;   // K, C
  const void* weight;      // [K, C]
  const float* gram;       // [C, C]
  const float* total;      // [C]
  const float* centre;     // [C]
  StatisticsParams found;  // of [pixels, K]
};

struct GramGradParams {
  int64_t pixels;
  int outputs, channels;  // K, C
  const void* weight;     // [K, C]
  const float* product;   // [K, C]
  const float* gram;      // [C, C]
  const float* total;     // [C]
  const float* centre;    // [C]
  const float* sum_g;     // [K]
  const float* scale;     // [K]
  const float* rstd;      // [K]
  float* scratch;         // gram_grad_scratch_floats() of it
  void* grad_weight;      // [K, C]
  float* grad_gamma;      // [K]
  void* coupling;         // [C, C]
  float* constant;        // [C]
};

}  // namespace resnet_fused
