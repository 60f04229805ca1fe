// grad_x = dz W + x^ coupling + constant on tensor cores, dz and x^ made on load (lazy_tile.cuh); without a weight dz
// is the first term. Then through the ReLU before x, with the two sums of grad_x that the norm there needs; or with
// another path's gradient added. Data in bfloat16 or float16; float32 is rounded to TF32 for the products.
//
// Bytes: g, z where a term needs it, bits, the pixels of x where they are used and the residual once from memory (dz
// and x^ again for each tile of grad_x, from L2), the matrices and grad_x once; partial sums 16 for each channel and
// chunk of rows. FLOPs 2*M*C*(K + C with a coupling). The largest of ResNet-50, from 256 to 64 channels at 56x56, batch
// 256, bf16, with z and sums: 1.03 GB, 0.31 ms at 3.35 TB/s, and 26 GFLOP.
//
// A block takes a tile of grad_x of a chunk of consecutive row tiles; blocks of the same chunk follow one another, so
// that what they read comes from memory once. On the way it adds its share of the partial sums of the weight's
// gradient, if there are any. Results are the same bits in every run on one GPU.
#pragma once

#include "conv_shapes.cuh"
#include "gradient_sums.cuh"
#include "lazy_tile.cuh"
#include "split_sums.cuh"

namespace resnet_fused::cuda {

// The vectors of a tile's channels in shared memory; zeros beyond the last.
enum DgradVector { kConstant, kInputScale, kInputShift, kInputMean, kDgradVectors };

template <class Shape>
constexpr int conv1x1_dgrad_shared_bytes() {
  static_assert(kPatchesBytes + TileSums<Shape>::kFoundBytes <= 2 * Shape::kStageBytes);
  static_assert(kSplitSumBytes <= 2 * Shape::kStageBytes);
  const int vectors = kDgradVectors * Shape::kTileCols * static_cast<int>(sizeof(float));
  return 2 * Shape::kStageBytes + TileSums<Shape>::kChunkBytes + vectors;
}

template <class Shape>
__device__ inline void load_dgrad_vectors(float* to, const Conv1x1DgradParams& p, int first_col) {
  static_assert(Shape::kTileCols <= kConvThreads);
  const int thread = anew(static_cast<int>(threadIdx.x)), c = first_col + thread;
  if (thread >= Shape::kTileCols) return;
  const float* const vectors[kDgradVectors] = {p.constant, p.input.scale, p.input.shift, p.x_mean};
#pragma unroll
  for (int i = 0; i < kDgradVectors; ++i) {
    to[i * Shape::kTileCols + thread] = vectors[i] && c < p.input.channels ? vectors[i][c] : 0.f;
  }
}

// sums += the rows of `values` that a tile has, times a matrix [depth, outputs] of its columns. `stages`: two, which
// every thread is done with at the end.
template <class T, class Shape, bool kVectors, class Values, class Params>
__device__ inline void add_product(typename Shape::Sums& sums, SharedAddress stages, const Params& values,
                                   const void* matrix, int outputs, int first_row, int first_col) {
  constexpr int kStep = kPanelColumns<T>, kValues = Shape::kTileRows * kRowBytes;
  const int steps = (values.channels + kStep - 1) / kStep;
  if (steps == 0) return;
  Values rows;
  const MatrixTile<T, kStep, Shape::kTileCols, kVectors> columns(matrix, values.channels, outputs, first_col);
  const auto stage_of = [&](int step) { return stages + step % 2 * Shape::kStageBytes; };
  rows.fetch(values, first_row, 0);
  columns.copy(stages + kValues, 0);
  commit_copies();
  rows.store(values, stages, first_row, 0);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const int next = (step + 1) * kStep;
    wait_for_copies<0>();
    __syncthreads();  // this stage is there, and all are done with the other one
    if (step + 1 < steps) {
      columns.copy(stage_of(step + 1) + kValues, next);
      commit_copies();
      rows.fetch(values, first_row, next);
    }
    const RowFragments<T> left(stage_of(step), Shape::warp_row());
    const ColumnFragments<T, kStep, false> right(stage_of(step) + kValues, Shape::warp_col());
    multiply_fragments<T, kStep / kFragmentDepth<T>>(sums, left, right);
    if (step + 1 < steps) rows.store(values, stage_of(step + 1), first_row, next);
  }
  __syncthreads();
}

// Which row of what is added, or of x, belongs to a row of grad_x; -1: none does.
__device__ inline int beside(const Conv1x1DgradParams& p, int row) {
  if (p.input.scale) return pixel_of(p.input, row);
  if (!p.residual) return -1;
  const int down = p.residual_stride_h, across = p.residual_stride_w;
  if (down == 1 && across == 1) return row;
  const int line = row / p.input.q, sample = line / p.input.p, h = line - sample * p.input.p;
  const int w = row - line * p.input.q;
  if (h % down != 0 || w % across != 0) return -1;
  const int height = (p.input.p + down - 1) / down, width = (p.input.q + across - 1) / across;
  return (sample * height + h / down) * width + w / across;
}

// Of row `at` of x or of what is added, the channels `c`; zeros where there is none.
template <class T, bool kVectors>
__device__ inline LazyGroup<T> load_beside(const Conv1x1DgradParams& p, int at, Channels c) {
  const int first = at < 0 ? 0 : at * p.input.channels + static_cast<int>(c.first);
  return load_group_of<T, kVectors>(p.input.scale ? p.input.x : p.residual, first, at < 0 ? 0 : c.count);
}

// sums += dz, where that is the product: one channel at a time, as it is for a correction alone, and registers are
// rare.
template <class T>
__device__ inline void add_gradient(float* sums, const LazyGradient& p, int row, Channels c) {
  const float factor = factor_of(p, row);
#pragma unroll 1
  for (int i = 0; i < c.count; ++i) {
    const int channel = static_cast<int>(c.first) + i, at = row * p.channels + channel;
    const float z = p.z ? to_float(static_cast<const T*>(p.z)[at]) : 0.f;
    float dz = to_float(static_cast<const T*>(p.g)[at]);
    if (!is_plain(p))
      dz = GradientVectors<false>(p, channel).apply(p, 0, dz, z, keep_bits(p, row, channel) & 1u, factor);
    sums[i] += to_float(from_float<T>(dz));
  }
}

// Eight channels of a pixel. `other`: of x or of the residual, at row `beside`.
template <class T, class Shape, bool kVectors>
__device__ inline void finish_dgrad(const Conv1x1DgradParams& p, float* sums, const float* vectors,
                                    const LazyGroup<T>& other, int beside, int row, Channels c, LaneSums& found) {
  const auto vector = [&](DgradVector which, int i) { return vectors[which * Shape::kTileCols + i]; };
  if (!p.weight && p.gradient.channels > 0) add_gradient<T>(sums, p.gradient, row, c);
  unsigned bits = 0xFFu;
  if (p.residual_mask && beside >= 0) {
    bits = p.residual_mask[static_cast<int64_t>(beside) * ((p.input.channels + 7) / 8) + c.first / 8];
  }
  Group<T> out;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const float beyond = other.value(i);
    float value = sums[i] + vector(kConstant, i);
    if (p.input.scale) {  // fmaf as in the forward, whose sign this is
      if (fmaf(vector(kInputScale, i), beyond, vector(kInputShift, i)) <= 0.f) value = 0.f;
    } else if (beside >= 0 && (bits >> i & 1u)) {
      value += beyond;
    }
    out.v[i] = from_float<T>(value);
    if (p.partial && i < c.count) {
      const float rounded = to_float(out.v[i]);
      found.g[i] += rounded;
      found.gx[i] = fmaf(rounded, beyond - vector(kInputMean, i), found.gx[i]);
    }
  }
  store<kVectors, T>(p.grad_x, row, p.input.channels, c, out);
}

// A warp's sums. `patches`: kPatchesBytes.
template <class T, class Shape, bool kVectors>
__device__ inline void finish_dgrad_tile(const typename Shape::Sums& sums, float* patches, const float* vectors,
                                         const Conv1x1DgradParams& p, int first_row, int first_col, LaneSums& found) {
  const WarpPatch<Shape> patch(patches);
  const Channels c = patch.channels(first_col, p.input.channels);
#pragma unroll
  for (int i = 0; i < Shape::kWarpRows / kPatchRows; ++i) {
    int row = anew(first_row) + patch.row + i * kPatchRows;
    patch.spread(sums, i);
#pragma unroll 1  // two pixels' values at a time would take registers
    for (int half = 0; half < 2; ++half, row += 8) {
      if (row >= p.gradient.rows || c.count == 0) continue;
      const int at = beside(p, row);
      const LazyGroup<T> other = load_beside<T, kVectors>(p, at, c);
      finish_dgrad<T, Shape, kVectors>(p, patch.group(half), vectors + patch.col, other, at, row, c, found);
    }
    __syncwarp();
  }
}

struct DgradTiles {
  TileWalk walk;      // over chunks and tiles of channels
  int rows_of_chunk;  // of row tiles that a block takes one after another
  int chunks;
};

template <class T, class Shape, bool kVectors>
__global__ void __launch_bounds__(kConvThreads, kGradientBlocks)
    conv1x1_dgrad_kernel(const Conv1x1DgradParams p, const DgradTiles tiles) {
#if RESNET_FUSED_HAS_TENSOR_CORES
  RESNET_FUSED_SHARED(shared);
  using Gradient = GradientTile<T, Shape::kTileRows, kPanelColumns<T>, kVectors>;
  using Input = InputTile<T, Shape::kTileRows, kPanelColumns<T>, kVectors>;
  unsigned char* behind = shared + 2 * Shape::kStageBytes;
  float* patches = reinterpret_cast<float*>(shared);
  const TileSums<Shape> kept{reinterpret_cast<float*>(shared + kPatchesBytes), reinterpret_cast<float*>(behind)};
  float* vectors = reinterpret_cast<float*>(behind + TileSums<Shape>::kChunkBytes);
  if (p.weight_grad.partial) add_weight_splits<T>(p.weight_grad, shared);
  const int across = tiles.walk.across, places = tiles.chunks * across;
#pragma unroll 1
  for (int place = static_cast<int>(blockIdx.x); place < places; place += static_cast<int>(gridDim.x)) {
    load_dgrad_vectors<Shape>(vectors, p, place % across * Shape::kTileCols);
    __syncthreads();
#pragma unroll 1
    for (int row = 0; row < tiles.rows_of_chunk; row += Shape::kTileRows) {
      const int at = anew(place), chunk = at / across;  // again for each tile: one number is kept for all
      const int first_row = chunk * tiles.rows_of_chunk + row, first_col = (at - chunk * across) * Shape::kTileCols;
      if (first_row >= p.gradient.rows) break;
      typename Shape::Sums sums{};
      if (p.weight) {
        add_product<T, Shape, kVectors, Gradient>(sums, shared_address(shared), p.gradient, p.weight, p.input.channels,
                                                  first_row, first_col);
      }
      if (p.coupling) {
        add_product<T, Shape, kVectors, Input>(sums, shared_address(shared), p.input, p.coupling, p.input.channels,
                                               first_row, first_col);
      }
      LaneSums found;
      finish_dgrad_tile<T, Shape, kVectors>(sums, patches, vectors, p, first_row, first_col, found);
      if (p.partial) {
        store_lane_sums<Shape>(found, kept);
        __syncthreads();
        add_to_chunk<Shape>(kept, row == 0);
      }
      __syncthreads();  // the next tile overwrites patches and sums
    }
    if (!p.partial) continue;
    const int at = anew(place), chunk = at / across;
    store_chunk_sums<Shape>(kept, p.partial, chunk, p.input.channels, (at - chunk * across) * Shape::kTileCols);
  }
#else
  __trap();  // its declaration refuses such GPUs
#endif
}

// Row tiles of a chunk: so many that partial sums, 16 bytes a channel, are a hundredth of what x and grad_x are, but
// not so many that there are less than eight chunks for an SM.
template <class T, class Shape>
DgradTiles dgrad_tiles(const Conv1x1DgradParams& p) {
  const int down = (p.gradient.rows + Shape::kTileRows - 1) / Shape::kTileRows;
  const int across = (p.input.channels + Shape::kTileCols - 1) / Shape::kTileCols;
  const int enough = (800 / static_cast<int>(sizeof(T)) + Shape::kTileRows - 1) / Shape::kTileRows;
  const int most = static_cast<int>(down / (8 * static_cast<int64_t>(multiprocessors())));
  const int of_chunk = !p.input.scale ? 1 : enough < most ? enough : most > 1 ? most : 1;
  const int chunks = (down + of_chunk - 1) / of_chunk;
  return {TileWalk(chunks, across, kGradientBlocks), of_chunk * Shape::kTileRows, chunks};
}

template <class T, class Shape, bool kVectors>
void conv1x1_dgrad_as(const Conv1x1DgradParams& p, cudaStream_t stream) {
  const DgradTiles tiles = dgrad_tiles<T, Shape>(p);
  constexpr int kBytes = conv1x1_dgrad_shared_bytes<Shape>();
  const auto kernel = conv1x1_dgrad_kernel<T, Shape, kVectors>;
  allow_shared(kernel, kBytes);
  RESNET_FUSED_LAUNCH_SHARED(kernel, dim3(tiles.walk.blocks), dim3(kConvThreads), kBytes, stream, p, tiles);
  if (p.partial) launch_add_gradient_sums(p.partial, tiles.chunks, p.found, stream);
}

// f(Shape{}, whether chunks of 16 bytes are whole): tiles of 64 pixels, as what is on its way of dz takes registers,
// and of 128 channels where there are as many tiles as SMs: dz is made once for each.
template <class T, class F>
void with_dgrad_shape(const Conv1x1DgradParams& p, const F& f) {
  const int k = p.gradient.channels, c = p.input.channels;
  const bool read = aligned(p.gradient) && aligned(p.input) && aligned(p.weight) && aligned(p.coupling);
  if (k == 0 || k % kGroup != 0 || c % kGroup != 0 || !read || !aligned(p.residual) || !aligned(p.grad_x)) {
    return f(TileShape<64, 64>{}, std::false_type{});
  }
  if constexpr (sizeof(T) == 2) {  // of 32 bits the largest tile lacks registers
    const int64_t pixels = p.gradient.rows, tiles = (pixels + 63) / 64 * ((c + 127) / 128);
    if (c > 64 && tiles >= multiprocessors()) return f(TileShape<64, 128>{}, std::true_type{});
  }
  f(TileShape<64, 64>{}, std::true_type{});
}

inline bool conv1x1_dgrad_is_empty(const Conv1x1DgradParams& p) {
  return p.gradient.rows == 0 || p.input.channels == 0;
}

// Floats of scratch for the sums, all else in `p` being set.
template <class T>
int64_t conv1x1_dgrad_partial_floats(const Conv1x1DgradParams& p) {
  int64_t chunks = 0;
  if (conv1x1_dgrad_is_empty(p)) return 0;
  with_dgrad_shape<T>(p, [&](auto shape, auto) { chunks = dgrad_tiles<T, decltype(shape)>(p).chunks; });
  return chunks * kGradientSums * p.input.channels;
}

// T: float, __half or __nv_bfloat16. Of an empty result only sums are stored, where they are asked for.
template <class T>
void launch_conv1x1_dgrad(const Conv1x1DgradParams& p, cudaStream_t stream) {
  if (!conv1x1_dgrad_is_empty(p)) {
    with_dgrad_shape<T>(p, [&](auto shape, auto vectors) {
      conv1x1_dgrad_as<T, decltype(shape), decltype(vectors)::value>(p, stream);
    });
  } else if (p.found.sum_g) {
    launch_add_gradient_sums(nullptr, 0, p.found, stream);
  }
}

}  // namespace resnet_fused::cuda
