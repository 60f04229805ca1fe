// z = x^ weight' rounded, x^ being x or relu(x_scale*x + x_shift), and the batch statistics of z: a 1x1 convolution for
// training on tensor cores, in one read and one write. Data in bfloat16 or float16; float32 is rounded to TF32. The
// kernel takes any filter, and conv_values is it too: what lies outside the image is zero behind the prologue as well.
//
// Bytes: the pixels of x once from memory (again for each tile of outputs, from L2), weight and z once. Partial
// statistics are 12 bytes per output and chunk of rows, written once and read once, at most a fiftieth of the rest but
// in small tensors. FLOPs 2*M*K*C. The widest of ResNet-50, 64 to 256 channels at 56x56, batch 256, bf16: 103 MB read
// and 411 MB written, 0.15 ms at 3.35 TB/s, and 26 GFLOP. Of a filter of several taps each is read once more, from L2,
// and goes through the prologue again.
//
// A block takes a tile of outputs of a chunk of consecutive row tiles; blocks of the same chunk follow one another, so
// that x comes from memory once. The order of a sum depends on the shape, and that of the statistics on the number of
// multiprocessors too: on one GPU results are the same bits in every run.
#pragma once

#include "conv_shapes.cuh"
#include "conv_statistics.cuh"

namespace resnet_fused::cuda {

template <class Shape>
constexpr int conv1x1_shared_bytes() {
  static_assert(kPatchesBytes + TileMoments<Shape>::kFoundBytes <= kStages * Shape::kStageBytes);
  return kStages * Shape::kStageBytes + TileMoments<Shape>::kChunkBytes;
}

struct ChunkedTiles {
  Runs runs;
  TileWalk walk;      // over chunks and tiles of outputs
  int rows_of_chunk;  // of row tiles that a block takes one after another
  int chunks;
};

// Row tiles of a chunk: so many that partial statistics, 12 bytes per output and chunk each way, are a fiftieth of what
// x and z are, but not so many that there are less than eight chunks for an SM.
inline int tiles_of_chunk(const ConvGeometry& g, int tile_rows, int element, int64_t tiles) {
  const int64_t few = 50 * 24 * int64_t(g.k), row = int64_t(element) * (g.c + g.k) * tile_rows;
  const int64_t enough = (few + row - 1) / row, most = tiles / (8 * static_cast<int64_t>(multiprocessors()));
  const int64_t chosen = enough < most ? enough : most;
  return chosen > 1 ? static_cast<int>(chosen) : 1;
}

template <class T, class Shape>
ChunkedTiles chunked_tiles(const ConvGeometry& g, bool statistics) {
  const int down = tiles_down<Shape>(g), across = tiles_across<Shape>(g);
  const int of_chunk = statistics ? tiles_of_chunk(g, Shape::kTileRows, sizeof(T), tiles_of<Shape>(g)) : 1;
  const int chunks = (down + of_chunk - 1) / of_chunk;
  const TileWalk walk(chunks, across, conv_blocks_per_sm<Shape>());
  return {Runs(g, kChunkElements<T>), walk, of_chunk * Shape::kTileRows, chunks};
}

template <class T, class Shape, bool kVectors, class Prologue>
__global__ void __launch_bounds__(kConvThreads, conv_blocks_per_sm<Shape>())
    conv1x1_kernel(const Conv1x1Params p, const ChunkedTiles tiles, const Prologue prologue) {
#if RESNET_FUSED_HAS_TENSOR_CORES
  RESNET_FUSED_SHARED(shared);
  const TileMoments<Shape> moments{reinterpret_cast<float*>(shared + kPatchesBytes),
                                   reinterpret_cast<float*>(shared + kStages * Shape::kStageBytes)};
  const int pixels = p.geometry.n * p.geometry.p * p.geometry.q;
#pragma unroll 1
  for (TilePlace at(tiles.walk); at.down < tiles.chunks; at.advance(tiles.walk)) {
    const int first_col = at.across * Shape::kTileCols, begin = at.down * tiles.rows_of_chunk;
    const int end = begin + tiles.rows_of_chunk < pixels ? begin + tiles.rows_of_chunk : pixels;
#pragma unroll 1
    for (int first_row = begin; first_row < end; first_row += Shape::kTileRows) {
      typename Shape::Sums sums{};
      sum_tile<T, Shape, kVectors>(sums, shared_address(shared), p.geometry, tiles.runs, p.x, p.weight, first_row,
                                   first_col, prologue);
      round_sums<T>(sums);
      if (p.partial) {
        find_warp_moments<Shape>(sums, moments, pixels - first_row);
        __syncthreads();
        if (threadIdx.x < Shape::kTileCols) add_to_chunk<Shape>(moments, pixels - first_row, first_row == begin);
      }
      store_tile<T, Shape, kVectors>(sums, reinterpret_cast<float*>(shared), p.z, pixels, p.geometry.k, first_row,
                                     first_col);
      __syncthreads();  // the next tile's copies overwrite patches and moments
    }
    if (p.partial && threadIdx.x < Shape::kTileCols) {
      store_chunk_moments<Shape>(moments, p.partial, at.down, p.geometry.k, first_col);
    }
  }
#else
  __trap();  // its declaration refuses such GPUs
#endif
}

template <class T, class Shape, bool kVectors, class Prologue>
void conv1x1_with(const Conv1x1Params& p, const Prologue& prologue, cudaStream_t stream) {
  const ChunkedTiles tiles = chunked_tiles<T, Shape>(p.geometry, p.partial);
  constexpr int kBytes = conv1x1_shared_bytes<Shape>();
  const auto kernel = conv1x1_kernel<T, Shape, kVectors, Prologue>;
  allow_shared(kernel, kBytes);
  const dim3 grid(tiles.walk.blocks);
  RESNET_FUSED_LAUNCH_SHARED(kernel, grid, dim3(kConvThreads), kBytes, stream, p, tiles, prologue);
}

template <class T, class Shape, bool kVectors>
void conv1x1_as(const Conv1x1Params& p, cudaStream_t stream) {
  with_prologue<true>(p.x_scale, p.x_shift,  // element by element too: a stem of three channels is a plain one
                      [&](const auto& prologue) { conv1x1_with<T, Shape, kVectors>(p, prologue, stream); });
  if (!p.partial) return;
  const ChunkedTiles tiles = chunked_tiles<T, Shape>(p.geometry, true);
  const RowChunks chunks(p.found.rows, tiles.rows_of_chunk);
  launch_merge_moments(p.partial, chunks, p.found, stream);
}

template <class T, class F>
void with_conv1x1_shape(const Conv1x1Params& p, const F& f) {
  const bool whole = aligned(p.x) && aligned(p.weight) && aligned(p.z) && aligned(p.x_scale) && aligned(p.x_shift);
  with_conv_shape<T>(p.geometry, whole, f);
}

inline bool conv1x1_is_empty(const ConvGeometry& g) { return g.n == 0 || g.p == 0 || g.q == 0 || g.k == 0; }

// Floats of scratch for the statistics, all else in `p` being set.
template <class T>
int64_t conv1x1_partial_floats(const Conv1x1Params& p) {
  int64_t chunks = 0;
  if (conv1x1_is_empty(p.geometry)) return 0;
  with_conv1x1_shape<T>(p,
                        [&](auto shape, auto) { chunks = chunked_tiles<T, decltype(shape)>(p.geometry, true).chunks; });
  return chunks * kMoments * p.geometry.k;
}

// T: float, __half or __nv_bfloat16. Of an empty result only statistics are stored, where they are asked for.
template <class T>
void launch_conv1x1(const Conv1x1Params& p, cudaStream_t stream) {
  if (!conv1x1_is_empty(p.geometry)) {
    with_conv1x1_shape<T>(
        p, [&](auto shape, auto vectors) { conv1x1_as<T, decltype(shape), decltype(vectors)::value>(p, stream); });
  } else if (p.found.mean) {
    launch_merge_moments(nullptr, RowChunks(0, 1), p.found, stream);
  }
}

}  // namespace resnet_fused::cuda
