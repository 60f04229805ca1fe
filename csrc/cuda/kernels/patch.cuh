// How a warp's sums get from the lanes that hold them into the order of memory: through a patch of shared memory of its
// own, 16 pixels of 32 outputs at a time, of which four lanes then have a pixel's, eight outputs each.
#pragma once

#include "conv_tile.cuh"

namespace resnet_fused::cuda {

constexpr int kPatchRows = 16, kPatchStride = 40;  // floats: 16-byte aligned, and eight lanes meet few banks twice
constexpr int kPatchBytes = kPatchRows * kPatchStride * static_cast<int>(sizeof(float));
constexpr int kPatchesBytes = kConvThreads / kWarpThreads * kPatchBytes;  // of all warps of a block

// Of all lanes of a warp that have the same outputs: each gets the same bits.
__device__ inline float sum_over_rows(float value) {
#pragma unroll
  for (int mask = 4; mask < kWarpThreads; mask *= 2) value += from_lane_xor(value, mask);
  return value;
}

// A lane's view of its warp's patch, one of those at `patches`; and what it has of the tile when sums were spread.
template <class Shape>
struct WarpPatch {
  float* to;     // where the lane's sums go
  float* from;   // its eight outputs of a pixel of the first eight
  int row, col;  // of that pixel and of these outputs, in the tile

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
  __device__ float* group(int half) const { return from + 8 * half * kPatchStride; }

  // Which of `outputs` these are, of a tile that begins at `first_col`.
  __device__ Channels channels(int first_col, int outputs) const {
    const int first = first_col + col, left = outputs - first;
    return {first, left < 0 ? 0 : left < kGroup ? left : kGroup};
  }
};

// `finish(sums, col, residual, row, c)` for each eight outputs of a pixel of a warp's tile, in the order of memory:
// their sums, the first one's place in the tile, what `residual` has there, if it is one, and where they lie.
// `patches`: kPatchesBytes.
template <class T, class Shape, bool kVectors, class Finish>
__device__ inline void for_each_group(const typename Shape::Sums& sums, float* patches, const ConvGeometry& g,
                                      const void* residual, int first_row, int first_col, const Finish& finish) {
  const WarpPatch<Shape> patch(patches);
  const Channels c = patch.channels(first_col, g.k);
  const int pixels = g.n * g.p * g.q;
#pragma unroll
  for (int i = 0; i < Shape::kWarpRows / kPatchRows; ++i) {
    const int row = first_row + patch.row + i * kPatchRows;
    Group<T> other[2];
    if (residual && c.count > 0) {  // on their way while the sums are exchanged
      if (row < pixels) other[0] = load<kVectors, T>(residual, row, g.k, c);
      if (row + 8 < pixels) other[1] = load<kVectors, T>(residual, row + 8, g.k, c);
    }
    patch.spread(sums, i);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (row + 8 * half >= pixels || c.count == 0) continue;
      finish(patch.group(half), patch.col, other[half], row + 8 * half, c);
    }
    __syncwarp();
  }
}

}  // namespace resnet_fused::cuda
