// One tile of a convolution's output, as sums in registers: copies to shared memory run kStages - 1 steps of the
// reduction ahead of the products.
#pragma once

#include <type_traits>

#include "conv_prologue.cuh"

namespace resnet_fused::cuda {

constexpr int kConvThreads = 256, kStages = 3;

// kTileRows pixels x kTileCols outputs by eight warps, each of which has all rows / (8 / across) pixels x 32 outputs.
template <int kTileRows_, int kTileCols_>
struct TileShape {
  static constexpr int kTileRows = kTileRows_, kTileCols = kTileCols_;
  static constexpr int kWarpCols = 32;
  static constexpr int kWarpsAcross = kTileCols / kWarpCols;
  static constexpr int kWarpRows = kTileRows / (kConvThreads / kWarpThreads / kWarpsAcross);
  static constexpr int kStageBytes = (kTileRows + kTileCols) * kRowBytes;
  static_assert(kWarpRows % 16 == 0);

  using Sums = WarpSums<kWarpRows, kWarpCols>;

  // Computed where they are asked for, once a tile, see anew().
  __device__ static int warp() { return anew(static_cast<int>(threadIdx.x)) / kWarpThreads; }
  __device__ static int lane() { return anew(static_cast<int>(threadIdx.x)) % kWarpThreads; }
  __device__ static int warp_row() { return warp() / kWarpsAcross * kWarpRows; }
  __device__ static int warp_col() { return warp() % kWarpsAcross * kWarpCols; }
};

// The tile of pixels from `first_row` and outputs from `first_col` on. `stages`: kStages of Shape::kStageBytes, which
// every thread is done with at the end. `prologue`: what is made of x, see conv_prologue.cuh.
template <class T, class Shape, bool kVectors, class Prologue>
__device__ inline void sum_tile(typename Shape::Sums& sums, SharedAddress stages, const ConvGeometry& g,
                                const Runs& runs, const void* x, const void* weight, int first_row, int first_col,
                                const Prologue& prologue) {
  constexpr int kStep = kRowBytes / static_cast<int>(sizeof(T));
  const PixelRows<T, Shape::kTileRows, kConvThreads, kVectors> pixels(g, x, first_row);
  const WeightRows<T, Shape::kTileCols, kConvThreads, kVectors> weights(g, weight, first_col);
  // What comes through registers is applied there.
  using InShared = std::conditional_t<kVectors, Prologue, AsItIs>;
  typename InShared::template InPlace<T, Shape::kTileRows, kConvThreads, kStages - 2> in_place;
  ReductionPlace place(runs, static_cast<int>(threadIdx.x) % kChunks * kChunkElements<T>);
  const int steps = (runs.elements + kStep - 1) / kStep;
  const auto copy = [&](int step, SharedAddress to) {
    unsigned came = 0;
    if (step < steps) {
      came = pixels.copy(to, g, runs, place, prologue);
      weights.copy(to + Shape::kTileRows * kRowBytes, g, runs, place);
      place.advance(runs, kStep);
    }
    in_place.copied(came);
    commit_copies();
  };
#pragma unroll 1
  for (int step = 0; step < kStages - 1; ++step) copy(step, stages + step * Shape::kStageBytes);
  const int a = Shape::warp_row() * kRowBytes, b = (Shape::kTileRows + Shape::warp_col()) * kRowBytes;
  const SharedAddress last = stages + (kStages - 1) * Shape::kStageBytes;
  SharedAddress from = stages;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    in_place.fetch(prologue, step * kStep, g.c);
    wait_for_copies<kStages - 2>();
    in_place.apply(from);
    __syncthreads();  // everybody's copies of this step are there, and all are done with the stage before it
    copy(step + kStages - 1, from == stages ? last : from - Shape::kStageBytes);
    multiply_rows<T>(sums, from + a, from + b);
    from = from == last ? stages : from + Shape::kStageBytes;
  }
  wait_for_copies<0>();
  __syncthreads();
}

}  // namespace resnet_fused::cuda
