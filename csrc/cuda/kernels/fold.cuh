// Sums over all rows, per channel, without atomics and in an order that depends on the shape alone: every thread sums
// its rows in float32, a block folds its threads, and a second kernel folds the blocks in float64.
//
// Of at most 1024 blocks, each of at most 256 channels, the second stage reads no more than 1 MB a sum, however large
// the tensor is.
#pragma once

#include "tile.cuh"

namespace resnet_fused::cuda {

constexpr int kFoldChannels = 32, kFoldRows = 16;  // threads of a block of the second stage

// Fold one value per thread over the rows of the block, always in the same order, and let the first row write it:
// partial is [blocks down, kSums, C].
template <int kSums>
__device__ inline void fold_block(const float (&sum)[kSums][kGroup], float* partial, int64_t channels, Channels c) {
  __shared__ float shared[kThreads * kGroup];
  const int across = blockDim.x * kGroup;
  for (int s = 0; s < kSums; ++s) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) shared[threadIdx.y * across + i * blockDim.x + threadIdx.x] = sum[s][i];
    __syncthreads();
    for (int i = threadIdx.y; i < kGroup; i += blockDim.y) {
      float total = 0.f;
      for (int y = 0; y < static_cast<int>(blockDim.y); ++y) total += shared[y * across + i * blockDim.x + threadIdx.x];
      if (i < c.count) partial[(static_cast<int64_t>(blockIdx.x) * kSums + s) * channels + c.first + i] = total;
    }
    __syncthreads();
  }
}

template <int kSums>
struct FoldParams {
  const float* partial;  // [row_blocks, kSums, C]
  int64_t row_blocks, channels;
  float* sums[kSums];  // [C] each, or null
};

// Second stage: blockIdx.y is the sum, a block takes 32 channels and walks down the partial sums of all blocks.
template <int kSums>
__global__ void __launch_bounds__(kFoldChannels* kFoldRows) fold_partial_kernel(const FoldParams<kSums> p) {
  __shared__ double shared[kFoldRows][kFoldChannels];
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kFoldChannels + threadIdx.x;
  const int s = blockIdx.y;
  double total = 0.;
  if (channel < p.channels) {
#pragma unroll 4
    for (int64_t row = threadIdx.y; row < p.row_blocks; row += kFoldRows) {
      total += p.partial[(row * kSums + s) * p.channels + channel];
    }
  }
  shared[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y == 0 && channel < p.channels && p.sums[s]) {
    for (int y = 1; y < kFoldRows; ++y) total += shared[y][threadIdx.x];
    p.sums[s][channel] = static_cast<float>(total);
  }
}

template <int kSums>
void launch_fold(const FoldParams<kSums>& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((p.channels + kFoldChannels - 1) / kFoldChannels), kSums);
  RESNET_FUSED_LAUNCH(fold_partial_kernel<kSums>, grid, dim3(kFoldChannels, kFoldRows), stream, p);
}

}  // namespace resnet_fused::cuda
