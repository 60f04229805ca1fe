// How a warp's sums get from the lanes that hold them into the order of memory: through a patch of shared memory of its
// own, 16 pixels of 32 outputs at a time, of which four lanes then have a pixel's, eight outputs each.
#pragma once

#include "conv_tile.cuh"

namespace resnet_fused::cuda {

constexpr int kPatchRows = 16, kPatchStride = 40;  // floats: 16-byte aligned, and eight lanes meet few banks twice
constexpr int kPatchBytes = kPatchRows * kPatchStride * static_cast<int>(sizeof(float));
constexpr int kPatchesBytes = kConvThreads / kWarpThreads * kPatchBytes;  // of all warps of a block

// A lane's view of its warp's patch, one of those at `patches`; and what it has of the tile when sums were spread.
template <class Shape>
struct WarpPatch {
  float* to;          // where the lane's sums go
  const float* from;  // its eight outputs of a pixel of the first eight
  int row, col;       // of that pixel and of these outputs, in the tile

  __device__ explicit WarpPatch(float* patches) {
    const int lane = Shape::lane();
    float* patch = patches + Shape::warp() * (kPatchRows * kPatchStride);
    to = patch + lane / 4 * kPatchStride + lane % 4 * 2;
    from = patch + lane / 4 * kPatchStride + lane % 4 * kGroup;
    row = Shape::warp_row() + lane / 4;
    col = Shape::warp_col() + lane % 4 * kGroup;
  }

  // The 16 pixels from 16 * i on; every lane of the warp has to come.
  __device__ void spread(const typename Shape::Sums& sums, int i) const {
#pragma unroll
    for (int j = 0; j < Shape::kWarpCols / 8; ++j) {
      to[8 * j] = sums.v[i][j][0];
      to[8 * j + 1] = sums.v[i][j][1];
      to[8 * j + 8 * kPatchStride] = sums.v[i][j][2];
      to[8 * j + 8 * kPatchStride + 1] = sums.v[i][j][3];
    }
    __syncwarp();
  }

  // The lane's eight outputs of its pixel of the first eight, or of the others.
  __device__ const float* group(int half) const { return from + 8 * half * kPatchStride; }

  // Which of `outputs` these are, of a tile that begins at `first_col`.
  __device__ Channels channels(int first_col, int outputs) const {
    const int first = first_col + col, left = outputs - first;
    return {first, left < 0 ? 0 : left < kGroup ? left : kGroup};
  }
};

}  // namespace resnet_fused::cuda
