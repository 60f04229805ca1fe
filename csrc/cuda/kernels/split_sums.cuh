// Sums over rows whose partial sums are matrices, added in order: by a launch of its own, or on the way of another.
//
// Partial sums lie as [splits, stride] in float32 and are added in float64, so that the order is of no weight. Where
// there are many, eight threads share an element; where there are few, which is where elements are many, one has it.
#pragma once

#include "../../gradient_params.h"
#include "conv_tile.cuh"

namespace resnet_fused::cuda {

constexpr int kSharedLanes = 8, kManySplits = 16;  // threads of an element, from so many splits on
constexpr int kSplitSumBytes = kConvThreads * static_cast<int>(sizeof(double));

// What a block does of it, of `blocks`; store(element, sum). `shared`: kSplitSumBytes, free again at the end.
template <class Store>
__device__ inline void add_splits(const float* partial, int splits, int64_t stride, int size, double* shared, int block,
                                  int blocks, const Store& store) {
  const int lanes = splits >= kManySplits ? kSharedLanes : 1, at_once = kConvThreads / lanes;
  const int thread = static_cast<int>(threadIdx.x), lane = thread / at_once;
  for (int first = block * at_once; first < size; first += blocks * at_once) {
    const int element = first + thread % at_once;
    double sum = 0.;
    if (element < size) {
#pragma unroll 4
      for (int split = lane; split < splits; split += lanes) sum += partial[split * stride + element];
    }
    if (lanes > 1) {
      shared[thread] = sum;
      __syncthreads();
      for (int other = 1; lane == 0 && other < lanes; ++other) sum += shared[thread + other * at_once];
      __syncthreads();
    }
    if (lane == 0 && element < size) store(element, static_cast<float>(sum));
  }
}

// Blocks for all elements.
inline int blocks_to_add(int splits, int size) {
  const int at_once = kConvThreads / (splits >= kManySplits ? kSharedLanes : 1);
  return (size + at_once - 1) / at_once;
}

// Those of a weight's gradient, on the way of the launch that all blocks are of.
template <class T>
__device__ inline void add_weight_splits(const SplitSums& p, void* shared) {
  T* to = static_cast<T*>(p.sum);
  add_splits(p.partial, p.splits, p.stride, p.size, static_cast<double*>(shared), static_cast<int>(blockIdx.x),
             static_cast<int>(gridDim.x), [&](int element, float sum) { to[element] = from_float<T>(sum); });
}

// The weight's gradient and the sum of dz, behind one another in each split.
template <class T>
__global__ void __launch_bounds__(kConvThreads) add_wgrad_splits_kernel(const Conv1x1WgradParams p, int splits) {
  __shared__ double shared[kConvThreads];
  const int size = p.gradient.channels * p.input.channels;
  const auto store = [&](int element, float sum) {
    if (element >= size) {
      p.sum_g[element - size] = sum;
    } else if (p.rounded) {
      static_cast<T*>(p.grad_weight)[element] = from_float<T>(sum);
    } else {
      static_cast<float*>(p.grad_weight)[element] = sum;
    }
  };
  const int all = size + p.gradient.channels;
  add_splits(p.partial, splits, all, all, shared, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x), store);
}

}  // namespace resnet_fused::cuda
