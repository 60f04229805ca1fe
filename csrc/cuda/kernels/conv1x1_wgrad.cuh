// grad_weight = dz' x^ and sum_g, the sum of dz, over all pixels on tensor cores: a product whose reduction runs down
// the rows of both operands, each made on load (lazy_tile.cuh). Data in bfloat16 or float16; float32 is rounded to
// TF32 for the product.
//
// Bytes: g, z where a term needs it, bits and the pixels of x once from memory, again from L2 for each tile of the
// other operand; partial sums 8*K*C for each split of the rows. FLOPs 2*M*K*C. The widest of ResNet-50, from 256
// outputs to 64 inputs at 56x56, batch 256, bf16: 0.92 GB with z, 0.28 ms at 3.35 TB/s, 26 GFLOP; 34 MB of partial
// sums.
//
// A block takes a tile of the weight and a split of the rows; blocks of one split follow one another and share what
// they read. There are as many splits as fill the GPU's SMs evenly: results depend on the shape and on their number,
// and are the same bits in every run. Partial sums are added in a second launch, without atomics.
#pragma once

#include "conv_shapes.cuh"
#include "lazy_tile.cuh"
#include "split_sums.cuh"

namespace resnet_fused::cuda {

// Rows of a step: as many as leave a thread registers for the values on their way.
template <class T>
constexpr int kWgradDepth = sizeof(T) == 4 ? 32 : 64;

template <class T, class Shape>
constexpr int kWgradStageBytes = kWgradDepth<T> * (Shape::kTileRows + Shape::kTileCols) * static_cast<int>(sizeof(T));

template <class T, class Shape>
constexpr int conv1x1_wgrad_shared_bytes() {
  return 2 * kWgradStageBytes<T, Shape>;
}

struct WgradSplits {
  int down, across;  // tiles of outputs and of inputs
  int splits, rows;  // rows of a split, a multiple of those of a step
};

// The number of splits that fill one wave of blocks or a few, with which the fullest SM has least to do. A split costs
// about as much as two steps more, for its partial sums and their addition.
template <class T, class Shape>
WgradSplits wgrad_splits(const Conv1x1WgradParams& p) {
  constexpr int kDepth = kWgradDepth<T>;
  const int down = (p.gradient.channels + Shape::kTileRows - 1) / Shape::kTileRows;
  const int across = (p.input.channels + Shape::kTileCols - 1) / Shape::kTileCols;
  const int64_t room = static_cast<int64_t>(multiprocessors()) * kGradientBlocks;
  const int64_t tiles = static_cast<int64_t>(down) * across, steps = (p.gradient.rows + kDepth - 1) / kDepth;
  const int64_t fewest = (tiles + room - 1) / room;
  int64_t chosen = 1, least = -1;
  for (int64_t waves = fewest; waves < fewest + 4; ++waves) {
    const int64_t fill = waves * room / tiles, splits = fill < steps ? fill : steps > 0 ? steps : 1;
    const int64_t cost = waves * ((steps + splits - 1) / splits + 2);
    if (least >= 0 && cost >= least) continue;
    least = cost;
    chosen = splits;
  }
  const int64_t each = steps > 0 ? (steps + chosen - 1) / chosen : 1;
  return {down, across, static_cast<int>(steps > 0 ? (steps + each - 1) / each : 1), static_cast<int>(each) * kDepth};
}

// A warp's sums to where the tile lies in a split's [K, C].
template <class Shape>
__device__ inline void store_weight_tile(const typename Shape::Sums& sums, float* to, const Conv1x1WgradParams& p,
                                         int first_output, int first_input) {
  const int lane = Shape::lane();
  const int output = first_output + Shape::warp_row() + lane / 4;
  const int input = first_input + Shape::warp_col() + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < Shape::kWarpRows / 8; ++i) {
    const int k = output + 8 * i;
    if (k >= p.gradient.channels) continue;
#pragma unroll
    for (int j = 0; j < Shape::kWarpCols / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int c = input + 8 * j + e;
        if (c < p.input.channels) to[k * p.input.channels + c] = sums.v[i / 2][j][i % 2 * 2 + e];
      }
    }
  }
}

// The sum of dz over a block's rows, from what each thread has of its chunk of channels.
template <class T, class Mine>
__device__ inline void store_sums(const float (&mine)[kChunkElements<T>], float* shared, float* to, int channels,
                                  int first_output) {
  constexpr int kTile = Mine::kAcross * kChunkElements<T>;
#pragma unroll
  for (int i = 0; i < kChunkElements<T>; ++i) shared[Mine::row() * kTile + Mine::column() + i] = mine[i];
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x);
  if (thread >= kTile || first_output + thread >= channels) return;
  float sum = 0.f;
  for (int row = 0; row < Mine::kRowsAtOnce; ++row) sum += shared[row * kTile + thread];
  to[first_output + thread] = sum;
}

template <class T, class Shape, bool kVectors>
__global__ void __launch_bounds__(kConvThreads, kGradientBlocks)
    conv1x1_wgrad_kernel(const Conv1x1WgradParams p, const WgradSplits splits) {
#if RESNET_FUSED_HAS_TENSOR_CORES
  RESNET_FUSED_SHARED(shared);
  constexpr int kDepth = kWgradDepth<T>, kOutputs = Shape::kTileRows, kInputs = Shape::kTileCols;
  using Outputs = TileChunks<T, kDepth, kOutputs>;
  const int tiles = splits.down * splits.across, split = static_cast<int>(blockIdx.x) / tiles;
  const int tile = static_cast<int>(blockIdx.x) % tiles;
  const int first_output = tile / splits.across * kOutputs, first_input = tile % splits.across * kInputs;
  const int begin = split * splits.rows, left = p.gradient.rows - begin;
  const int end = begin + (left < splits.rows ? left : splits.rows);
  GradientTile<T, kDepth, kOutputs, kVectors> dz;
  InputTile<T, kDepth, kInputs, kVectors> x;
  float total[kChunkElements<T>] = {};
  const auto add = [&](const LazyChunk<T>& chunk) {
    if (first_input != 0) return;  // blocks of the first inputs do it
#pragma unroll
    for (int i = 0; i < kChunkElements<T>; ++i) total[i] += chunk.value(i);
  };
  const auto fetch = [&](int row) {
    dz.fetch(p.gradient, row, first_output);
    x.fetch(p.input, row, first_input);
  };
  const auto store = [&](int row, SharedAddress stage) {
    dz.store(p.gradient, stage, row, first_output, add);
    x.store(p.input, stage + Outputs::kBytes, row, first_input);
  };
  typename Shape::Sums sums{};
  const auto stage_of = [&](int step) { return shared_address(shared) + step % 2 * kWgradStageBytes<T, Shape>; };
  fetch(begin);
  store(begin, stage_of(0));
#pragma unroll 1
  for (int step = 0, row = begin; row < end; ++step, row += kDepth) {
    __syncthreads();  // this stage is there, and all are done with the other one
    if (row + kDepth < end) fetch(row + kDepth);
    const ColumnFragments<T, kDepth, true> rows(stage_of(step), Shape::warp_row());
    const ColumnFragments<T, kDepth, false> columns(stage_of(step) + Outputs::kBytes, Shape::warp_col());
    multiply_fragments<T, kDepth / kFragmentDepth<T>>(sums, rows, columns);
    if (row + kDepth < end) store(row + kDepth, stage_of(step + 1));
  }
  const int size = p.gradient.channels * p.input.channels;
  float* partial = p.partial + static_cast<int64_t>(split) * (size + p.gradient.channels);
  store_weight_tile<Shape>(sums, partial, p, first_output, first_input);
  if (first_input != 0) return;
  __syncthreads();
  store_sums<T, Outputs>(total, reinterpret_cast<float*>(shared), partial + size, p.gradient.channels, first_output);
#else
  __trap();  // its declaration refuses such GPUs
#endif
}

// f(Shape{}, whether chunks of 16 bytes are whole): tiles as large as the weight is and as registers allow; of 128
// inputs rather than outputs, as dz is made once for each.
template <class T, class F>
void with_wgrad_shape(const Conv1x1WgradParams& p, const F& f) {
  const int k = p.gradient.channels, c = p.input.channels;
  if (k % kGroup != 0 || c % kGroup != 0 || !aligned(p.gradient) || !aligned(p.input)) {
    return f(TileShape<64, 64>{}, std::false_type{});
  }
  if (c > 64) return f(TileShape<64, 128>{}, std::true_type{});
  if constexpr (sizeof(T) == 2) {  // of 32 bits it would lack registers
    if (k > 64) return f(TileShape<128, 64>{}, std::true_type{});
  }
  f(TileShape<64, 64>{}, std::true_type{});
}

inline bool conv1x1_wgrad_is_empty(const Conv1x1WgradParams& p) {
  return p.gradient.rows == 0 || p.gradient.channels == 0 || p.input.channels == 0;
}

// Splits of the rows, all but `partial` being set; 0 of an empty weight or of no rows.
template <class T>
int conv1x1_wgrad_splits(const Conv1x1WgradParams& p) {
  int splits = 0;
  if (conv1x1_wgrad_is_empty(p)) return splits;
  with_wgrad_shape<T>(p, [&](auto shape, auto) { splits = wgrad_splits<T, decltype(shape)>(p).splits; });
  return splits;
}

template <class T, class Shape, bool kVectors>
void conv1x1_wgrad_as(const Conv1x1WgradParams& p, cudaStream_t stream) {
  const WgradSplits splits = wgrad_splits<T, Shape>(p);
  constexpr int kBytes = conv1x1_wgrad_shared_bytes<T, Shape>();
  const auto kernel = conv1x1_wgrad_kernel<T, Shape, kVectors>;
  allow_shared(kernel, kBytes);
  const dim3 grid(static_cast<unsigned>(splits.down * splits.across * splits.splits));
  RESNET_FUSED_LAUNCH_SHARED(kernel, grid, dim3(kConvThreads), kBytes, stream, p, splits);
}

// The partial sums alone. T: float, __half or __nv_bfloat16. Nothing is launched where there are no splits.
template <class T>
void start_conv1x1_wgrad(const Conv1x1WgradParams& p, cudaStream_t stream) {
  if (conv1x1_wgrad_is_empty(p)) return;
  with_wgrad_shape<T>(
      p, [&](auto shape, auto vectors) { conv1x1_wgrad_as<T, decltype(shape), decltype(vectors)::value>(p, stream); });
}

template <class T>
void add_conv1x1_wgrad(const Conv1x1WgradParams& p, int splits, cudaStream_t stream) {
  const int size = p.gradient.channels * (p.input.channels + 1);
  const dim3 grid(static_cast<unsigned>(blocks_to_add(splits, size)));
  RESNET_FUSED_LAUNCH(add_wgrad_splits_kernel<T>, grid, dim3(kConvThreads), stream, p, splits);
}

// Both launches.
template <class T>
void launch_conv1x1_wgrad(const Conv1x1WgradParams& p, cudaStream_t stream) {
  start_conv1x1_wgrad<T>(p, stream);
  const int splits = conv1x1_wgrad_splits<T>(p);
  if (splits > 0) add_conv1x1_wgrad<T>(p, splits, stream);
}

}  // namespace resnet_fused::cuda
