// What becomes of a tile's sums: scale, shift, a factor for each sample, residual and ReLU in float32, one rounding,
// 16-byte stores; and the sign bits of what is stored.
#pragma once

#include "patch.cuh"

namespace resnet_fused::cuda {

// Batch norm and bias of output k as scale and shift.
__device__ inline void make_affine(float& scale, float& shift, const RunningNorm& p, int k) {
  scale = 1.f;
  shift = p.bias ? p.bias[k] : 0.f;
  if (!p.mean) return;
  scale = (p.gamma ? p.gamma[k] : 1.f) / sqrtf(p.var[k] + p.eps);
  shift = (shift - p.mean[k]) * scale + (p.beta ? p.beta[k] : 0.f);
}

// Of kTileCols outputs from `first` on, to shared memory.
template <int kTileCols>
__device__ inline void load_affine(float* scale, float* shift, const ConvNormAddReluParams& p, int first) {
  for (int i = threadIdx.x; i < kTileCols; i += kConvThreads) {
    const int k = first + i;
    float a = 1.f, b = 0.f;
    if (k < p.geometry.k && p.scale) {
      a = p.scale[k];
      b = p.shift[k];
    } else if (k < p.geometry.k) {
      make_affine(a, b, p.norm, k);
    }
    scale[i] = a;
    shift[i] = b;
  }
}

// Bit i for the i-th of a group's channels that are there: whether a gradient passes its ReLU, as a NaN's does.
template <class T>
__device__ inline unsigned passing_bits(const Group<T>& out, Channels c) {
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    if (i < c.count && !(to_float(out.v[i]) <= 0.f)) bits |= 1u << i;
  }
  return bits;
}

// Eight outputs of one pixel.
template <class T, bool kVectors>
__device__ inline void finish_group(const ConvNormAddReluParams& p, const float* sums, const float* scale,
                                    const float* shift, const Group<T>& residual, int row, Channels c) {
  const float factor = p.sample_factor ? p.sample_factor[row / (p.geometry.p * p.geometry.q)] : 1.f;
  Group<T> out;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    float y = factor * fmaf(scale[i], sums[i], shift[i]);
    if (p.residual) y += to_float(residual.v[i]);
    if (p.relu && y < 0.f) y = 0.f;  // not fmaxf, which would drop NaN
    out.v[i] = from_float<T>(y);
  }
  store<kVectors, T>(p.out, row, p.geometry.k, c, out);
  if (p.mask) p.mask[static_cast<int64_t>(row) * ((p.geometry.k + 7) / 8) + c.first / 8] = passing_bits(out, c);
}

// A warp's sums. `patches`: kPatchesBytes.
template <class T, class Shape, bool kVectors>
__device__ inline void finish_tile(const typename Shape::Sums& sums, float* patches, const float* scale,
                                   const float* shift, const ConvNormAddReluParams& p, int first_row, int first_col) {
  const auto finish = [&](const float* group, int col, const Group<T>& residual, int row, Channels c) {
    finish_group<T, kVectors>(p, group, scale + col, shift + col, residual, row, c);
  };
  for_each_group<T, Shape, kVectors>(sums, patches, p.geometry, p.residual, first_row, first_col, finish);
}

}  // namespace resnet_fused::cuda
