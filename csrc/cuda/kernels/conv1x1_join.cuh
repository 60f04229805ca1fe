// out = relu(sample_factor*(scale*(x^ weight') + shift) + r) on tensor cores, x^ being x or relu(x_scale*x + x_shift),
// r a residual, raw or as scale*residual + shift, and a projection: the product of x2 and weight2, with a scale and a
// shift of its own. The join of a residual block, of which the result and its sign mask alone are written. In a chain
// of evaluation (conv_chain) both scales and shifts are made of running statistics here. Data in bfloat16 or float16;
// float32 is rounded to TF32.
//
// Bytes: x, the pixels of x2 and residual once from memory (x and x2 again for each tile of outputs, from L2), weights,
// out and mask once. FLOPs 2*M*K*(C + C2). Of ResNet-50 the largest, 64 to 256 channels at 56x56, batch 256, bf16, with
// residual and mask: 0.1 GB of x, 0.41 of residual, 0.44 written: 0.28 ms at 3.35 TB/s, and 26 GFLOP.
//
// The epilogue leaves registers for tiles of 128 pixels of 64 outputs; beside a second product, in 32 bits, of 64.
// Blocks take tiles in turn, those of the same pixels one after another. The order of a sum depends on the shape alone.
#pragma once

#include "conv_epilogue.cuh"
#include "conv_shapes.cuh"

namespace resnet_fused::cuda {

// The vectors of a tile's outputs in shared memory, kTileCols floats each; zeros beyond the last output.
enum JoinVector { kScale, kShift, kResidualScale, kResidualShift, kScale2, kShift2, kJoinVectors };

template <class Shape>
constexpr int conv1x1_join_shared_bytes() {
  static_assert(kPatchesBytes <= kStages * Shape::kStageBytes);
  return kStages * Shape::kStageBytes + kJoinVectors * Shape::kTileCols * static_cast<int>(sizeof(float));
}

template <class Shape>
__device__ inline void load_join_vectors(float* to, const Conv1x1JoinParams& p, int first_col) {
  static_assert(Shape::kTileCols <= kConvThreads);
  if (threadIdx.x >= Shape::kTileCols) return;
  const int k = first_col + static_cast<int>(threadIdx.x);
#pragma unroll
  for (int i = 0; i < kJoinVectors; ++i) {
    to[i * Shape::kTileCols + threadIdx.x] = p.vectors[i] && k < p.geometry.k ? p.vectors[i][k] : 0.f;
  }
  if (!p.makes_vectors || k >= p.geometry.k) return;
  make_affine(to[kScale * Shape::kTileCols + threadIdx.x], to[kShift * Shape::kTileCols + threadIdx.x], p.norms[0], k);
  make_affine(to[kScale2 * Shape::kTileCols + threadIdx.x], to[kShift2 * Shape::kTileCols + threadIdx.x], p.norms[1],
              k);
}

// A warp's sums of one product, in place, as y = scale*sums + shift, by the vectors at `vector` and the next.
template <class Shape>
__device__ inline void scale_sums(typename Shape::Sums& sums, const float* vectors, int vector) {
  const float* scale = vectors + vector * Shape::kTileCols + Shape::warp_col() + Shape::lane() % 4 * 2;
  const float* shift = scale + Shape::kTileCols;
#pragma unroll
  for (int j = 0; j < Shape::kWarpCols / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float a = scale[8 * j + e], b = shift[8 * j + e];
#pragma unroll
      for (int i = 0; i < Shape::kWarpRows / 8; ++i) {
        float& sum = sums.v[i / 2][j][i % 2 * 2 + e];
        sum = fmaf(a, sum, b);
      }
    }
  }
}

// In place too, each pixel by the factor of its sample.
template <class Shape>
__device__ inline void factor_sums(typename Shape::Sums& sums, const Conv1x1JoinParams& p, int first_row) {
  const int of_sample = p.geometry.p * p.geometry.q, pixels = p.geometry.n * of_sample;
  const int row = first_row + Shape::warp_row() + Shape::lane() / 4;
#pragma unroll
  for (int i = 0; i < Shape::kWarpRows / 8; ++i) {
    const float factor = row + 8 * i < pixels ? p.sample_factor[(row + 8 * i) / of_sample] : 0.f;
#pragma unroll
    for (int j = 0; j < Shape::kWarpCols / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) sums.v[i / 2][j][i % 2 * 2 + e] *= factor;
    }
  }
}

template <int kRows, int kCols>
__device__ inline void add_sums(WarpSums<kRows, kCols>& to, const WarpSums<kRows, kCols>& sums) {
#pragma unroll
  for (int i = 0; i < kRows / 16; ++i) {
#pragma unroll
    for (int j = 0; j < kCols / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) to.v[i][j][e] += sums.v[i][j][e];
    }
  }
}

// Eight outputs of a pixel: the residual, ReLU, rounding, and the bits of the output as rounded, a NaN's being set.
template <class T, class Shape, bool kVectors>
__device__ inline void finish_join(const Conv1x1JoinParams& p, const float* sums, const float* vectors,
                                   const Group<T>& residual, int64_t row, Channels c) {
  const float* scale = vectors + kResidualScale * Shape::kTileCols;
  const float* shift = vectors + kResidualShift * Shape::kTileCols;
  Group<T> out;
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    float y = sums[i];
    if (p.residual) {
      const float r = to_float(residual.v[i]);
      y += p.vectors[kResidualScale] ? fmaf(scale[i], r, shift[i]) : r;
    }
    if (p.relu && y < 0.f) y = 0.f;  // not fmaxf, which would drop NaN
    out.v[i] = from_float<T>(y);
    if (i < c.count && !(to_float(out.v[i]) <= 0.f)) bits |= 1u << i;
  }
  store<kVectors, T>(p.out, row, p.geometry.k, c, out);
  if (p.mask) p.mask[row * ((p.geometry.k + 7) / 8) + c.first / 8] = static_cast<uint8_t>(bits);
}

// A warp's sums. `patches`: kPatchesBytes.
template <class T, class Shape, bool kVectors>
__device__ inline void join_tile(const typename Shape::Sums& sums, float* patches, const float* vectors,
                                 const Conv1x1JoinParams& p, int first_row, int first_col) {
  const auto finish = [&](const float* group, int col, const Group<T>& residual, int row, Channels c) {
    finish_join<T, Shape, kVectors>(p, group, vectors + col, residual, row, c);
  };
  for_each_group<T, Shape, kVectors>(sums, patches, p.geometry, p.residual, first_row, first_col, finish);
}

// Two accumulators leave room for two blocks of any tile.
template <class Shape, bool kProjection>
constexpr int join_blocks_per_sm() {
  return kProjection ? 2 : conv_blocks_per_sm<Shape>();
}

struct JoinTiles {
  Runs runs, second;
  int down;  // tiles of the same outputs
  TileWalk walk;
};

template <class T, class Shape, bool kVectors, class Prologue, bool kProjection>
__global__ void __launch_bounds__(kConvThreads, join_blocks_per_sm<Shape, kProjection>())
    conv1x1_join_kernel(const Conv1x1JoinParams p, const JoinTiles tiles, const Prologue prologue) {
#if RESNET_FUSED_HAS_TENSOR_CORES
  RESNET_FUSED_SHARED(shared);
  float* vectors = reinterpret_cast<float*>(shared + kStages * Shape::kStageBytes);
#pragma unroll 1
  for (TilePlace at(tiles.walk); at.down < tiles.down; at.advance(tiles.walk)) {
    const int first_row = at.down * Shape::kTileRows, first_col = at.across * Shape::kTileCols;
    load_join_vectors<Shape>(vectors, p, first_col);
    typename Shape::Sums sums{};
    sum_tile<T, Shape, kVectors>(sums, shared_address(shared), p.geometry, tiles.runs, p.x, p.weight, first_row,
                                 first_col, prologue);
    scale_sums<Shape>(sums, vectors, kScale);
    if (p.sample_factor) factor_sums<Shape>(sums, p, first_row);
    if constexpr (kProjection) {
      typename Shape::Sums second{};
      sum_tile<T, Shape, kVectors>(second, shared_address(shared), p.projection, tiles.second, p.x2, p.weight2,
                                   first_row, first_col, AsItIs());
      scale_sums<Shape>(second, vectors, kScale2);
      add_sums(sums, second);
    }
    join_tile<T, Shape, kVectors>(sums, reinterpret_cast<float*>(shared), vectors, p, first_row, first_col);
    __syncthreads();  // the next tile's copies overwrite the patches, and its vectors this one's
  }
#else
  __trap();  // its declaration refuses such GPUs
#endif
}

template <class T, class Shape, bool kVectors, bool kProjection>
void conv1x1_join_as(const Conv1x1JoinParams& p, cudaStream_t stream) {
  const int down = tiles_down<Shape>(p.geometry), across = tiles_across<Shape>(p.geometry);
  const JoinTiles tiles{Runs(p.geometry, kChunkElements<T>), Runs(p.projection, kChunkElements<T>), down,
                        TileWalk(down, across, join_blocks_per_sm<Shape, kProjection>())};
  constexpr int kBytes = conv1x1_join_shared_bytes<Shape>();
  with_prologue<kVectors>(p.x_scale, p.x_shift, [&](const auto& prologue) {
    const auto kernel = conv1x1_join_kernel<T, Shape, kVectors, std::decay_t<decltype(prologue)>, kProjection>;
    allow_shared(kernel, kBytes);
    RESNET_FUSED_LAUNCH_SHARED(kernel, dim3(tiles.walk.blocks), dim3(kConvThreads), kBytes, stream, p, tiles, prologue);
  });
}

// T: float, __half or __nv_bfloat16. Nothing is launched for an empty result.
template <class T>
void launch_conv1x1_join(const Conv1x1JoinParams& p, cudaStream_t stream) {
  const ConvGeometry& g = p.geometry;
  if (g.n == 0 || g.p == 0 || g.q == 0 || g.k == 0) return;
  const bool second = !p.projects || (p.projection.c > 0 && p.projection.c % kChunkElements<T> == 0);
  const bool read = aligned(p.x) && aligned(p.x_scale) && aligned(p.x_shift) && aligned(p.weight) && aligned(p.x2) &&
                    aligned(p.weight2) && aligned(p.residual);
  with_conv_shape<T>(g, second && read && aligned(p.out), [&](auto shape, auto vectors) {
    constexpr bool kVectors = decltype(vectors)::value;
    using Smallest = TileShape<64, 64>;  // of elements as well, which are many instructions and rare
    using Narrow = std::conditional_t<(decltype(shape)::kTileCols > 64), TileShape<128, 64>, decltype(shape)>;
    using Both = std::conditional_t<kVectors && sizeof(T) == 2, TileShape<128, 64>, Smallest>;
    p.projects ? conv1x1_join_as<T, Both, kVectors, true>(p, stream)
               : conv1x1_join_as<T, std::conditional_t<kVectors, Narrow, Smallest>, kVectors, false>(p, stream);
  });
}

}  // namespace resnet_fused::cuda
