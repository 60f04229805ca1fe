// Products of float32 by float32 on the ordinary units, where rounding to TF32 would cost digits: a thread's four by
// four sums from rows in shared memory.
#pragma once

#include "tile.cuh"

namespace resnet_fused::cuda {

// Four floats at a multiple of 16 bytes.
struct alignas(16) Four {
  float v[4];
};

// sums += left' right of kDepth rows: four of each row from `left` and from `right` on, at multiples of 16 bytes. Rows
// lie as many floats apart as the pitches say.
template <int kDepth>
__device__ inline void add_products(float (&sums)[4][4], const float* left, int left_pitch, const float* right,
                                    int right_pitch) {
#pragma unroll
  for (int k = 0; k < kDepth; ++k) {
    const Four a = *reinterpret_cast<const Four*>(left + k * left_pitch);
    const Four b = *reinterpret_cast<const Four*>(right + k * right_pitch);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[i][j] = fmaf(a.v[i], b.v[j], sums[i][j]);
    }
  }
}

__device__ inline void add_squares(float (&to)[4][4], const float (&sums)[4][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) to[i][j] += sums[i][j];
  }
}

// A pair left <= right of `tiles`, of those in an upper triangle row by row.
struct TilePair {
  int left, right;

  __device__ TilePair(int pair, int tiles) : left(0), right(pair) {
    for (; right >= tiles - left; ++left) right -= tiles - left;
    right += left;
  }
};

inline int tile_pairs(int tiles) { return tiles * (tiles + 1) / 2; }

}  // namespace resnet_fused::cuda
