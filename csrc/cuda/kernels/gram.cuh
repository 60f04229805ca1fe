// gram = d' d and total = sum of d, d = x^ - centre, x^ being a or relu(scale*a + shift), over the pixels that a stride
// leaves: 64 by 64 of its elements a block, on tensor cores where data have 16 bits.
//
// Bytes: a once from memory, and as often from L2 as there are tiles of 64 channels; partial sums, 16 KB a split and
// pair of tiles, half of that on the diagonal, written once and read once: of one wave of blocks, 4 MB. FLOPs
// M*C*(C+64), of which the symmetric matrix needs M*C*(C+1). The largest of ResNet-50, 64 channels at 56x56, batch 256,
// bf16: 103 MB, 0.03 ms at 3.35 TB/s, and 7 GFLOP; the widest, 512 channels at 7x7: 13 MB, from L2 103, and 7 GFLOP.
// By its machine code for sm_90 a block issues some 310 instructions a warp for 64 rows of one tile, 470 for two, most
// of them to make d, which each pair does anew: 0.03 ms of an H100's issue slots for either of these and all between,
// as much as memory takes for the narrowest. Not measured.
//
// Rows are copied to shared memory ahead of the products and become d where they lie, by the thread that copied them,
// which sums d before it is rounded. Both operands of the products are then read transposed, as it is pixels that are
// summed over. Sums are of one stage's rows, at most 64, before they are added to those of the split, and splits are
// added in float64: on the diagonal all terms are positive, and tensor cores are said to truncate. Float32 is
// multiplied in full, whatever is allowed for convolutions: variances follow by a difference, which would lose TF32's
// ten bits first. How many splits there are depends on the number of multiprocessors: on one GPU results are the same
// bits in every run.
#pragma once

#include "gram_rows.cuh"

namespace resnet_fused::cuda {

constexpr int kGramFewStages = 8;  // whose sums of d may come one after another
constexpr int kGramFewSplits = 32, kGramFewLanes = 4, kGramMostLanes = 16;  // of a column of a merging block

// Where a thread's sums [i][e] are in the tile: of 16 bits a warp has 32 rows by 16 columns.
template <class T>
struct GramPlace {
  int row, col;

  __device__ GramPlace(int i, int e) {
    const int thread = threadIdx.x, warp = thread / kWarpThreads, lane = thread % kWarpThreads;
    if constexpr (sizeof(T) == 2) {
      row = warp / 4 * 32 + i / 2 * 16 + lane / 4 + e / 2 * 8;
      col = warp % 4 * 16 + i % 2 * 8 + lane % 4 * 2 + e % 2;
    } else {
      row = thread / 16 * 4 + i;
      col = thread % 16 * 4 + e;
    }
  }
};

// sums += left' right of one stage, both sides in shared memory.
template <class T>
__device__ inline void add_stage(float (&sums)[4][4], unsigned char* left, unsigned char* right) {
  using Stage = GramStage<T>;
  float part[4][4] = {};
  const int thread = threadIdx.x;
  if constexpr (sizeof(T) == 2) {
    // Of 16 pixels by 16 channels a lane names a row of 8 channels: eight pixels of either half, then the next eight.
    const int warp = thread / kWarpThreads, lane = thread % kWarpThreads;
    const int named = (lane % 8 + lane / 16 * 8) * Stage::kPitch + lane / 8 % 2 * kChunkBytes;
    const SharedAddress a = shared_address(left) + named + warp / 4 * 32 * static_cast<int>(sizeof(T));
    const SharedAddress b = shared_address(right) + named + warp % 4 * 16 * static_cast<int>(sizeof(T));
#pragma unroll
    for (int k = 0; k < Stage::kRows; k += 16) {
      uint32_t columns[4];
      load_matrices_transposed(columns, b + k * Stage::kPitch);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t rows[4];
        load_matrices_transposed(rows, a + k * Stage::kPitch + 16 * i * static_cast<int>(sizeof(T)));
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const uint32_t pair[2] = {columns[j], columns[j + 2]};
          multiply<T>(part[2 * i + j], rows, pair);
        }
      }
    }
  } else {
    constexpr int kFloats = Stage::kPitch / static_cast<int>(sizeof(float));
    add_products<Stage::kRows>(part, reinterpret_cast<const float*>(left) + thread / 16 * 4, kFloats,
                               reinterpret_cast<const float*>(right) + thread % 16 * 4, kFloats);
  }
  add_squares(sums, part);
}

// A pair of tiles over the rows of a split: the sums to `to`, on the diagonal above it alone, and there the totals.
template <class T, bool kVectors, bool kDiagonal>
__device__ inline void sum_pair(const GramParams& p, const GramSplits& s, unsigned char* shared, int split,
                                const TilePair& pair, float* to) {
  using Stage = GramStage<T>;
  GramRows<T, kVectors, kDiagonal> rows(p, pair);
  const int first = split * s.rows, left = s.pixels - first, count = left < s.rows ? left : s.rows;
  const int steps = (count + Stage::kRows - 1) / Stage::kRows;
  const auto copy = [&](int step, int stage) {
    if (step < steps) {
      const int done = step * Stage::kRows;
      rows.copy(shared_address(shared) + stage, p, s, first + done, count - done);
    }
    commit_copies();
  };
#pragma unroll 1
  for (int step = 0; step < kGramStages - 1; ++step) copy(step, step * Stage::kBytes);
  constexpr int kLast = (kGramStages - 1) * Stage::kBytes;
  float sums[4][4] = {};
  int stage = 0;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<kGramStages - 2>();
    rows.shift(shared_address(shared) + stage, p, count - step * Stage::kRows);
    if (kDiagonal && step % kGramFewStages == 0) rows.keep_totals();
    __syncthreads();  // everybody's rows of this step are there, and all are done with the stage before it
    copy(step + kGramStages - 1, stage == 0 ? kLast : stage - Stage::kBytes);
    add_stage<T>(sums, shared + stage, shared + stage + (kDiagonal ? 0 : Stage::kSideBytes));
    stage = stage == kLast ? 0 : stage + Stage::kBytes;
  }
  wait_for_copies<0>();
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const GramPlace<T> at(i, e);
      if (!kDiagonal || at.row <= at.col) to[at.row * kGramCols + at.col] = sums[i][e];
    }
  }
  if constexpr (kDiagonal) {
    float* totals = p.partial + s.totals + (static_cast<int64_t>(split) * s.tiles + pair.left) * kGramCols;
    rows.store_totals(reinterpret_cast<float*>(shared), totals);
  }
}

template <class T, bool kVectors>
__global__ void __launch_bounds__(kGramThreads, kGramBlocksPerSm) gram_kernel(const GramParams p, const GramSplits s) {
#if RESNET_FUSED_HAS_TENSOR_CORES
  RESNET_FUSED_SHARED(shared);
  const int block = blockIdx.x, split = block / s.pairs;  // pairs of the same rows follow one another
  const TilePair pair(block - split * s.pairs, s.tiles);
  float* to = p.partial + static_cast<int64_t>(block) * kGramTile;
  if (pair.left == pair.right) {
    sum_pair<T, kVectors, true>(p, s, shared, split, pair, to);
  } else {
    sum_pair<T, kVectors, false>(p, s, shared, split, pair, to);
  }
#else
  __trap();  // its declaration refuses such GPUs
#endif
}

// Adds the splits: a block has a row of a pair's tile, each lane down takes every so many of its splits; or a tile's
// totals, behind all rows. A row is mirrored as it is, so that the result is symmetric.
template <int kLanes>
__global__ void __launch_bounds__(kGramCols* kLanes) gram_merge_kernel(const GramParams p, const GramSplits s) {
  __shared__ double found[kLanes][kGramCols];
  const int x = threadIdx.x, y = threadIdx.y, rows = s.pairs * kGramCols, block = blockIdx.x;
  const bool of_gram = block < rows;
  const TilePair pair(of_gram ? block / kGramCols : 0, s.tiles);
  const int row = of_gram ? pair.left * kGramCols + block % kGramCols : 0;
  const int col = (of_gram ? pair.right : block - rows) * kGramCols + x;
  const bool there = row < p.channels && col < p.channels && row <= col;
  const int64_t pitch = static_cast<int64_t>(of_gram ? s.pairs * kGramCols : s.tiles) * kGramCols;
  const float* from = p.partial + (of_gram ? static_cast<int64_t>(block) * kGramCols + x : s.totals + col);
  double total = 0.;
#pragma unroll 4
  for (int split = there ? y : s.count; split < s.count; split += kLanes) total += from[split * pitch];
  found[y][x] = total;
  __syncthreads();
  if (y != 0 || !there) return;
  for (int lane = 1; lane < kLanes; ++lane) total += found[lane][x];
  const float sum = static_cast<float>(total);
  if (of_gram) {
    p.gram[static_cast<int64_t>(row) * p.channels + col] = sum;
    p.gram[static_cast<int64_t>(col) * p.channels + row] = sum;
  } else {
    p.total[col] = sum;
  }
}

template <class T>
GramSplits gram_splits(const GramParams& p) {
  return GramSplits(p.grid, p.channels, GramStage<T>::kRows);
}

// Floats of scratch, all else in `p` being set.
template <class T>
int64_t gram_partial_floats(const GramParams& p) {
  if (p.channels == 0) return 0;
  const GramSplits s = gram_splits<T>(p);
  return s.totals + static_cast<int64_t>(s.count) * s.tiles * kGramCols;
}

template <class T, bool kVectors>
void gram_first_stage(const GramParams& p, const GramSplits& s, cudaStream_t stream) {
  constexpr int kBytes = kGramStages * GramStage<T>::kBytes;
  const auto kernel = gram_kernel<T, kVectors>;
  allow_shared(kernel, kBytes);
  RESNET_FUSED_LAUNCH_SHARED(kernel, dim3(s.count * s.pairs), dim3(kGramThreads), kBytes, stream, p, s);
}

inline void merge_gram(const GramParams& p, const GramSplits& s, cudaStream_t stream) {
  const dim3 grid(s.pairs * kGramCols + s.tiles), few(kGramCols, kGramFewLanes), many(kGramCols, kGramMostLanes);
  if (s.count > kGramFewSplits) {
    RESNET_FUSED_LAUNCH(gram_merge_kernel<kGramMostLanes>, grid, many, stream, p, s);
  } else {
    RESNET_FUSED_LAUNCH(gram_merge_kernel<kGramFewLanes>, grid, few, stream, p, s);
  }
}

// T: float, __half or __nv_bfloat16. Of no pixels only the second stage is launched, of no channels nothing.
template <class T>
void launch_gram(const GramParams& p, cudaStream_t stream) {
  if (p.channels == 0) return;
  const GramSplits s = gram_splits<T>(p);
  if (s.count > 0) {
    const bool vectors = p.channels % kChunkElements<T> == 0 && aligned(p.a);
    vectors ? gram_first_stage<T, true>(p, s, stream) : gram_first_stage<T, false>(p, s, stream);
  }
  merge_gram(p, s, stream);
}

}  // namespace resnet_fused::cuda
