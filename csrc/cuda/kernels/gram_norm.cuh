// Batch statistics of z = W a from the Gram matrix of a, or what batch norm makes of them, in one launch: a block has
// sixteen rows of W.
//
// The covariance is symmetric: of each 128 columns the rows above are taken once and count twice. It is made from
// `gram` on the way to shared memory and never written. Bytes: the upper half of gram, 4 each, from L2 for every
// sixteen rows of W, W once and vectors. FLOPs K*C*C and a little, in full float32: at K = 2048, C = 512 that is 0.5
// GFLOP in 128 blocks, 8 us at the 67 TFLOP/s of an H100's data sheet, and 67 MB out of L2. Sums are of at most 16
// products before they are added to others.
#pragma once

#include "affine.cuh"
#include "weight_panel.cuh"

namespace resnet_fused::cuda {

template <class T>
__global__ void __launch_bounds__(kPanelThreads) gram_norm_kernel(const GramNormParams p) {
  __shared__ Four shared[(kPanelFloats + kPanelWeightFloats) / 4];
  __shared__ float found[2][kPanelGroups][kPanelRows];  // mean and variance
  const int first_row = static_cast<int>(blockIdx.x) * kPanelRows;
  WeightPanel<T> panel(p.weight, p.gram, p.outputs, p.channels, first_row, shared[0].v);
  const float per_pixel = p.found.rows > 0 ? 1.f / static_cast<float>(p.found.rows) : 0.f;
  const auto covariance = [&](float value, int i, int j) {
    return fmaf(-(p.total[i] * per_pixel), p.total[j] * per_pixel, value * per_pixel);
  };
  float mean[4] = {}, var[4] = {};
  const int channels = p.found.rows > 0 ? p.channels : 0;  // without pixels all are zeros
#pragma unroll 1
  for (int first_col = 0; first_col < channels; first_col += kPanelCols) {
    const int end = first_col + kPanelCols < channels ? first_col + kPanelCols : channels;
    float sums[4][4] = {};
    panel.add(sums, 0, first_col, first_col, covariance);
    add_squares(sums, sums);  // for the rows below, which the columns mirror
    panel.add(sums, first_col, end, first_col, covariance);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int col = first_col + panel.col + j;
      const float at = col < channels ? fmaf(p.total[col], per_pixel, p.centre[col]) : 0.f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float w = panel.weight(i, col);
        var[i] = fmaf(sums[i][j], w, var[i]);
        mean[i] = fmaf(w, at, mean[i]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // a warp has the same rows
    const float sum = sum_of_lanes<1, 32>(mean[i]), square = sum_of_lanes<1, 32>(var[i]);
    if (threadIdx.x % 32 != 0) continue;
    found[0][panel.group][panel.row + i] = sum;
    found[1][panel.group][panel.row + i] = square;
  }
  __syncthreads();
  const int row = first_row + static_cast<int>(threadIdx.x);
  if (threadIdx.x >= kPanelRows || row >= p.outputs) return;
  const float square = found[1][0][threadIdx.x] + found[1][1][threadIdx.x];
  const float m2 = (square < 0.f ? 0.f : square) * static_cast<float>(p.found.rows);  // NaN passes
  store_statistics(p.found, row, found[0][0][threadIdx.x], m2);
}

// T: float, __half or __nv_bfloat16. Nothing is launched for no outputs.
template <class T>
void launch_gram_norm(const GramNormParams& p, cudaStream_t stream) {
  if (p.outputs == 0) return;
  const dim3 grid((p.outputs + kPanelRows - 1) / kPanelRows);
  RESNET_FUSED_LAUNCH(gram_norm_kernel<T>, grid, dim3(kPanelThreads), stream, p);
}

}  // namespace resnet_fused::cuda
