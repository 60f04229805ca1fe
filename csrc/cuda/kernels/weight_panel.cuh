// Sixteen rows of a weight [K, C] times 128 columns of a matrix [C, C] in float32, a block: what the ops on a Gram
// join's small matrices share. The weight is widened to float32, and nothing is rounded but sums.
#pragma once

#include "full_product.cuh"
#include "instructions.cuh"

namespace resnet_fused::cuda {

constexpr int kPanelThreads = 256, kPanelGroups = 2;  // groups, each of which sums half of a step's depth
constexpr int kPanelRows = 16, kPanelCols = 128, kPanelDepth = 32;
constexpr int kPanelPitch = kPanelRows + 4;  // of the weight, a column of it a row in shared memory
constexpr int kPanelFloats = kPanelDepth * kPanelCols, kPanelWeightFloats = kPanelDepth * kPanelPitch;

// Of float32, by lanes whose numbers differ in bits from `first` to below `end`: each gets the same bits.
template <int kFirst, int kEnd>
__device__ inline float sum_of_lanes(float value) {
#pragma unroll
  for (int mask = kFirst; mask < kEnd; mask *= 2) value += from_lane_xor(value, mask);
  return value;
}

template <class T>
class WeightPanel {
  static constexpr int kPerThread = kPanelFloats / kPanelThreads, kStep = kPanelThreads / kPanelCols;
  static constexpr int kWeights = kPanelDepth * kPanelRows / kPanelThreads;

 public:
  int group, row, col;  // this thread's, and its four rows and columns from there on

  // `shared`: kPanelFloats, and kPanelWeightFloats behind them.
  __device__ WeightPanel(const void* weight, const float* matrix, int outputs, int channels, int first_row,
                         float* shared)
      : weight_(static_cast<const T*>(weight)),
        matrix_(matrix),
        outputs_(outputs),
        channels_(channels),
        first_row_(first_row),
        panel_(shared) {
    constexpr int kThreadsOfGroup = kPanelThreads / kPanelGroups, kAcross = kPanelCols / 4;
    const int within = threadIdx.x % kThreadsOfGroup;
    group = threadIdx.x / kThreadsOfGroup;
    row = within / kAcross * 4;
    col = within % kAcross * 4;
  }

  // Of column c of the weight in row first_row + row + r; 0 where there is none.
  __device__ float weight(int r, int c) const { return weight_at(first_row_ + row + r, c); }

  // sums += W[rows, begin..end) * matrix[begin..end), columns from first_col on], this group's part of it.
  // `element(value, i, j)`: what is multiplied in the place of an element of the matrix.
  template <class Element>
  __device__ void add(float (&sums)[4][4], int begin, int end, int first_col, const Element& element) {
    if (begin < end) fetch(begin, end, first_col);
#pragma unroll 1
    for (int i = begin; i < end; i += kPanelDepth) {
      __syncthreads();  // all are done with the step before
      put(i, end, first_col, element);
      __syncthreads();
      if (i + kPanelDepth < end) fetch(i + kPanelDepth, end, first_col);  // on their way meanwhile
      constexpr int kShare = kPanelDepth / kPanelGroups;
      float part[4][4] = {};
      add_products<kShare>(part, panel_ + kPanelFloats + group * kShare * kPanelPitch + row, kPanelPitch,
                           panel_ + group * kShare * kPanelCols + col, kPanelCols);
      add_squares(sums, part);
    }
  }

 private:
  __device__ float weight_at(int k, int c) const {
    return k < outputs_ && c < channels_ ? to_float(weight_[static_cast<int64_t>(k) * channels_ + c]) : 0.f;
  }

  __device__ void fetch(int i, int end, int first_col) {
    const int j = first_col + static_cast<int>(threadIdx.x) % kPanelCols, y = threadIdx.x / kPanelCols;
    const float* from = matrix_ + static_cast<int64_t>(i + y) * channels_ + j;
#pragma unroll
    for (int n = 0; n < kPerThread; ++n) {
      const bool there = i + y + n * kStep < end && j < channels_;
      elements_[n] = there ? from[static_cast<int64_t>(n * kStep) * channels_] : 0.f;
    }
#pragma unroll
    for (int n = 0; n < kWeights; ++n) {
      const int at = threadIdx.x + n * kPanelThreads, c = i + at % kPanelDepth;
      weights_[n] = c < end ? weight_at(first_row_ + at / kPanelDepth, c) : 0.f;
    }
  }

  template <class Element>
  __device__ void put(int i, int end, int first_col, const Element& element) const {
    const int j = first_col + static_cast<int>(threadIdx.x) % kPanelCols, y = threadIdx.x / kPanelCols;
#pragma unroll
    for (int n = 0; n < kPerThread; ++n) {
      const int depth = y + n * kStep;
      const bool there = i + depth < end && j < channels_;
      panel_[depth * kPanelCols + j - first_col] = there ? element(elements_[n], i + depth, j) : 0.f;
    }
#pragma unroll
    for (int n = 0; n < kWeights; ++n) {
      const int at = threadIdx.x + n * kPanelThreads;
      panel_[kPanelFloats + at % kPanelDepth * kPanelPitch + at / kPanelDepth] = weights_[n];
    }
  }

  const T* weight_;
  const float* matrix_;
  int outputs_, channels_, first_row_;
  float* panel_;
  float elements_[kPerThread], weights_[kWeights];
};

}  // namespace resnet_fused::cuda
