// What becomes of a tile's sums: scale, shift, residual and ReLU in float32, one rounding, 16-byte stores.
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
    float a = 1.f, b = 0.f;
    if (first + i < p.geometry.k) make_affine(a, b, p.norm, first + i);
    scale[i] = a;
    shift[i] = b;
  }
}

// Eight outputs of one pixel.
template <class T, bool kVectors>
__device__ inline void finish_group(const ConvNormAddReluParams& p, const float* sums, const float* scale,
                                    const float* shift, const Group<T>& residual, int64_t row, Channels c) {
  Group<T> out;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    float y = fmaf(scale[i], sums[i], shift[i]);
    if (p.residual) y += to_float(residual.v[i]);
    if (p.relu && y < 0.f) y = 0.f;  // not fmaxf, which would drop NaN
    out.v[i] = from_float<T>(y);
  }
  store<kVectors, T>(p.out, row, p.geometry.k, c, out);
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
