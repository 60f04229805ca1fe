// out = relu(factor * norm(conv(x, weight) + bias) + residual), and its sign bits where they are asked for, on tensor
// cores: an implicit GEMM of [pixels, reduction] and [outputs, reduction], everything behind it on the float32
// accumulator. Data in bfloat16 or float16; float32 is rounded to TF32. conv_join is it too, given scale and shift.
//
// Bytes: x once from memory (again for each filter tap and each tile of outputs, from L2), weight, residual and out
// once. A 3x3 of 64 channels at 56x56, batch 256, bf16: 0.2 GB, 0.06 ms at 3.35 TB/s, and 59 GFLOP.
//
// Blocks are as many as the GPU holds and take tiles in turn, those of the same pixels one after another, so that x
// comes from memory once. The order of a sum depends on the shape alone.
#pragma once

#include "conv_epilogue.cuh"
#include "conv_shapes.cuh"

namespace resnet_fused::cuda {

template <class Shape>
constexpr int conv_shared_bytes() {
  const int affine = 2 * Shape::kTileCols * static_cast<int>(sizeof(float));
  static_assert(kPatchesBytes <= kStages * Shape::kStageBytes);
  return kStages * Shape::kStageBytes + affine;
}

struct ConvTiles {
  Runs runs;
  int down;  // tiles of the same outputs
  TileWalk walk;
};

template <class T, class Shape, bool kVectors>
__global__ void __launch_bounds__(kConvThreads, conv_blocks_per_sm<Shape>())
    conv_norm_add_relu_kernel(const ConvNormAddReluParams p, const ConvTiles tiles) {
#if RESNET_FUSED_HAS_TENSOR_CORES
  RESNET_FUSED_SHARED(shared);
  float* scale = reinterpret_cast<float*>(shared + kStages * Shape::kStageBytes);
  float* shift = scale + Shape::kTileCols;
  for (TilePlace at(tiles.walk); at.down < tiles.down; at.advance(tiles.walk)) {
    const int first_row = at.down * Shape::kTileRows, first_col = at.across * Shape::kTileCols;
    load_affine<Shape::kTileCols>(scale, shift, p, first_col);
    typename Shape::Sums sums{};
    sum_tile<T, Shape, kVectors>(sums, shared_address(shared), p.geometry, tiles.runs, p.x, p.weight, first_row,
                                 first_col, AsItIs());
    finish_tile<T, Shape, kVectors>(sums, reinterpret_cast<float*>(shared), scale, shift, p, first_row, first_col);
    __syncthreads();  // the next tile's copies overwrite the patches, and its affine map this one's
  }
#else
  __trap();  // its declaration refuses such GPUs
#endif
}

template <class T, class Shape, bool kVectors>
void conv_norm_add_relu_as(const ConvNormAddReluParams& p, cudaStream_t stream) {
  const int down = tiles_down<Shape>(p.geometry), across = tiles_across<Shape>(p.geometry);
  const ConvTiles tiles{Runs(p.geometry, kChunkElements<T>), down, TileWalk(down, across, conv_blocks_per_sm<Shape>())};
  constexpr int kBytes = conv_shared_bytes<Shape>();
  const auto kernel = conv_norm_add_relu_kernel<T, Shape, kVectors>;
  allow_shared(kernel, kBytes);
  RESNET_FUSED_LAUNCH_SHARED(kernel, dim3(tiles.walk.blocks), dim3(kConvThreads), kBytes, stream, p, tiles);
}

// T: float, __half or __nv_bfloat16. Nothing is launched for an empty result.
template <class T>
void launch_conv_norm_add_relu(const ConvNormAddReluParams& p, cudaStream_t stream) {
  const ConvGeometry& g = p.geometry;
  if (g.n == 0 || g.p == 0 || g.q == 0 || g.k == 0) return;
  const bool whole = aligned(p.x) && aligned(p.weight) && aligned(p.residual) && aligned(p.out);
  with_conv_shape<T>(g, whole, [&](auto shape, auto vectors) {
    conv_norm_add_relu_as<T, decltype(shape), decltype(vectors)::value>(p, stream);
  });
}

}  // namespace resnet_fused::cuda
