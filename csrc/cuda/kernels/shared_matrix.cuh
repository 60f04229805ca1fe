// A matrix in shared memory whose rows are 128 bytes, and a product of two of them by one warp.
//
// Rows of 128 bytes meet the same banks: the eight 16-byte chunks of row r lie at their place xor r % 8, so that both a
// copy of whole rows and ldmatrix, which takes one chunk of eight rows, touch every bank once.
#pragma once

#include "instructions.cuh"

namespace resnet_fused::cuda {

constexpr int kRowBytes = 128, kChunkBytes = 16, kChunks = kRowBytes / kChunkBytes;
constexpr int kWarpThreads = 32;

template <class T>
constexpr int kChunkElements = kChunkBytes / static_cast<int>(sizeof(T));

__device__ inline int chunk_offset(int row, int chunk) { return row * kRowBytes + (chunk ^ (row & 7)) * kChunkBytes; }

// What a warp sums: kRows/16 x kCols/8 fragments of 16x8.
template <int kRows, int kCols>
struct WarpSums {
  float v[kRows / 16][kCols / 8][4];
};

template <class T, int kWords>
__device__ inline void round_fragment(uint32_t (&words)[kWords]) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = to_tf32(words[i]);
  }
}

// sums += a[kRows][128 bytes] * b[kCols][128 bytes]^T. `a` and `b`: in shared memory, where the warp's rows begin, a
// multiple of 8 rows from where the matrix does.
template <class T, int kRows, int kCols>
__device__ inline void multiply_rows(WarpSums<kRows, kCols>& sums, SharedAddress a, SharedAddress b) {
  static_assert(kRows % 16 == 0 && kCols % 16 == 0);
  // Which row of which chunk this lane names. Of b: columns 0-7, their second half, columns 8-15, theirs. All rows are
  // alike but for multiples of 8, and so is where their chunks lie.
  const int lane = threadIdx.x % kWarpThreads, turn = lane % 8;
  a += lane % 16 * kRowBytes;
  b += (lane % 8 + lane / 16 * 8) * kRowBytes;
#pragma unroll
  for (int step = 0; step < kChunks / 2; ++step) {
    uint32_t right[kCols / 16][4];
#pragma unroll
    for (int j = 0; j < kCols / 16; ++j) {
      load_matrices(right[j], b + 16 * j * kRowBytes + ((2 * step + lane / 8 % 2) ^ turn) * kChunkBytes);
      round_fragment<T>(right[j]);
    }
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i) {
      uint32_t left[4];
      load_matrices(left, a + 16 * i * kRowBytes + ((2 * step + lane / 16) ^ turn) * kChunkBytes);
      round_fragment<T>(left);
#pragma unroll
      for (int j = 0; j < kCols / 8; ++j) {
        const uint32_t pair[2] = {right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]};
        multiply<T>(sums.v[i][j], left, pair);
      }
    }
  }
}

}  // namespace resnet_fused::cuda
