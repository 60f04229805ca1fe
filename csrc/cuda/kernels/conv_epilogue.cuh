// What becomes of a tile's sums: scale, shift, residual and ReLU in float32, one rounding, 16-byte stores.
#pragma once

#include "patch.cuh"

namespace resnet_fused::cuda {

// Of kTileCols outputs from `first` on: batch norm and bias as scale and shift, to shared memory.
template <int kTileCols>
__device__ inline void load_affine(float* scale, float* shift, const ConvNormAddReluParams& p, int first) {
  for (int i = threadIdx.x; i < kTileCols; i += kConvThreads) {
    const int k = first + i;
    float a = 1.f, b = 0.f;
    if (k < p.geometry.k) {
      if (p.bias) b = p.bias[k];
      if (p.mean) {
        a = (p.gamma ? p.gamma[k] : 1.f) / sqrtf(p.var[k] + p.eps);
        b = (b - p.mean[k]) * a + (p.beta ? p.beta[k] : 0.f);
      }
    }
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

// A warp's sums, 16 pixels at a time. `patches`: kPatchesBytes.
template <class T, class Shape, bool kVectors>
__device__ inline void finish_tile(const typename Shape::Sums& sums, float* patches, const float* scale,
                                   const float* shift, const ConvNormAddReluParams& p, int first_row, int first_col) {
  const WarpPatch<Shape> patch(patches);
  const Channels c = patch.channels(first_col, p.geometry.k);
  const int pixels = p.geometry.n * p.geometry.p * p.geometry.q;
#pragma unroll
  for (int i = 0; i < Shape::kWarpRows / kPatchRows; ++i) {
    const int row = first_row + patch.row + i * kPatchRows;
    Group<T> residual[2];
    if (p.residual && c.count > 0) {  // on their way while the sums are exchanged
      if (row < pixels) residual[0] = load<kVectors, T>(p.residual, row, p.geometry.k, c);
      if (row + 8 < pixels) residual[1] = load<kVectors, T>(p.residual, row + 8, p.geometry.k, c);
    }
    patch.spread(sums, i);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (row + 8 * half >= pixels || c.count == 0) continue;
      finish_group<T, kVectors>(p, patch.group(half), scale + patch.col, shift + patch.col, residual[half],
                                row + 8 * half, c);
    }
    __syncwarp();
  }
}

}  // namespace resnet_fused::cuda
