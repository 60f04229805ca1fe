// out = relu(norm(conv(x, weight) + bias) + residual) on tensor cores: an implicit GEMM of [pixels, reduction] and
// [outputs, reduction], everything behind it on the float32 accumulator. Data in bfloat16 or float16; float32 is
// rounded to TF32.
//
// Bytes: x once from memory (again for each filter tap and each tile of outputs, from L2), weight, residual and out
// once. A 3x3 of 64 channels at 56x56, batch 256, bf16: 0.2 GB, 0.06 ms at 3.35 TB/s, and 59 GFLOP.
//
// Blocks are as many as the GPU holds and take tiles in turn, those of the same pixels one after another, so that x
// comes from memory once. The order of a sum depends on the shape alone.
#pragma once

#include "conv_epilogue.cuh"

namespace resnet_fused::cuda {

template <class Shape>
constexpr int conv_shared_bytes() {
  const int affine = 2 * Shape::kTileCols * static_cast<int>(sizeof(float));
  static_assert(kConvThreads / kWarpThreads * kPatchBytes <= kStages * Shape::kStageBytes);
  return kStages * Shape::kStageBytes + affine;
}

// Blocks that an SM has room for: registers suffice for two of the largest tiles, shared memory (164 KB or more but on
// sm_86, 89 and 120, with 100) for one to three.
template <class Shape>
constexpr int conv_blocks_per_sm() {
  return Shape::kTileRows * Shape::kTileCols <= 64 * 64 ? 3 : 2;
}

struct ConvTiles {
  Runs runs;
  int count, across;  // tiles, and those of the same pixels
};

template <class T, class Shape, bool kVectors>
__global__ void __launch_bounds__(kConvThreads, conv_blocks_per_sm<Shape>())
    conv_norm_add_relu_kernel(const ConvNormAddReluParams p, const ConvTiles tiles) {
#if RESNET_FUSED_HAS_TENSOR_CORES
  RESNET_FUSED_SHARED(shared);
  float* scale = reinterpret_cast<float*>(shared + kStages * Shape::kStageBytes);
  float* shift = scale + Shape::kTileCols;
  float* patch = reinterpret_cast<float*>(shared + Shape::warp() * kPatchBytes);
  for (int tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
    const int first_row = tile / tiles.across * Shape::kTileRows, first_col = tile % tiles.across * Shape::kTileCols;
    load_affine<Shape::kTileCols>(scale, shift, p, first_col);
    typename Shape::Sums sums{};
    sum_tile<T, Shape, kVectors>(sums, shared_address(shared), p.geometry, tiles.runs, p.x, p.weight, first_row,
                                 first_col);
    finish_tile<T, Shape, kVectors>(sums, patch, scale, shift, p, first_row, first_col);
    __syncthreads();  // the next tile's copies overwrite the patches, and its affine map this one's
  }
#else
  __trap();  // its declaration refuses such GPUs
#endif
}

inline int64_t tiles_of(const ConvGeometry& g, int rows, int cols) {
  const int64_t pixels = static_cast<int64_t>(g.n) * g.p * g.q;
  return (pixels + rows - 1) / rows * ((g.k + cols - 1) / cols);
}

template <class T, class Shape, bool kVectors>
void conv_norm_add_relu_as(const ConvNormAddReluParams& p, cudaStream_t stream) {
  const ConvTiles tiles{Runs(p.geometry, kChunkElements<T>),
                        static_cast<int>(tiles_of(p.geometry, Shape::kTileRows, Shape::kTileCols)),
                        (p.geometry.k + Shape::kTileCols - 1) / Shape::kTileCols};
  const unsigned room = multiprocessors() * conv_blocks_per_sm<Shape>(), wanted = static_cast<unsigned>(tiles.count);
  const dim3 grid(wanted < room ? wanted : room);
  constexpr int kBytes = conv_shared_bytes<Shape>();
  const auto kernel = conv_norm_add_relu_kernel<T, Shape, kVectors>;
  allow_shared(kernel, kBytes);
  RESNET_FUSED_LAUNCH_SHARED(kernel, grid, dim3(kConvThreads), kBytes, stream, p, tiles);
}

// T: float, __half or __nv_bfloat16. Nothing is launched for an empty result. The largest tiles that still give every
// SM one: they read least per product.
template <class T>
void launch_conv_norm_add_relu(const ConvNormAddReluParams& p, cudaStream_t stream) {
  const ConvGeometry& g = p.geometry;
  if (g.n == 0 || g.p == 0 || g.q == 0 || g.k == 0) return;
  const bool whole = g.c > 0 && g.c % kChunkElements<T> == 0 && g.k % kGroup == 0;
  if (!whole || !(aligned(p.x) && aligned(p.weight) && aligned(p.residual) && aligned(p.out))) {
    return conv_norm_add_relu_as<T, TileShape<128, 64>, false>(p, stream);
  }
  const int64_t sms = multiprocessors();
  if constexpr (sizeof(T) == 2) {  // of 32 bits the largest tile lacks registers
    if (g.k > 64 && tiles_of(g, 128, 128) >= sms) {
      return conv_norm_add_relu_as<T, TileShape<128, 128>, true>(p, stream);
    }
  }
  if (tiles_of(g, 128, 64) >= sms) {
    conv_norm_add_relu_as<T, TileShape<128, 64>, true>(p, stream);
  } else {
    conv_norm_add_relu_as<T, TileShape<64, 64>, true>(p, stream);
  }
}

}  // namespace resnet_fused::cuda
