// An epilogue for training: sums rounded to the dtype of the data and stored as they are, and the statistics of what
// was stored: per output the sum of the differences from an origin near the data, and of their squares.
//
// Each warp takes its rows' differences from their own mean, a second pass over registers, so nothing cancels whatever
// the data is; a thread per output then adds the warps' sums, and those of the tiles that the block takes of a chunk of
// rows, about the mean that came first, in order and without atomics. What comes out is a partial of moments.cuh.
#pragma once

#include "moments.cuh"
#include "patch.cuh"

namespace resnet_fused::cuda {

template <class T, int kRows, int kCols>
__device__ inline void round_sums(WarpSums<kRows, kCols>& sums) {
#pragma unroll
  for (int i = 0; i < kRows / 16; ++i) {
#pragma unroll
    for (int j = 0; j < kCols / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        alignas(4) T pair[2];
        round_pair(pair, sums.v[i][j][e], sums.v[i][j][e + 1]);
        sums.v[i][j][e] = to_float(pair[0]);
        sums.v[i][j][e + 1] = to_float(pair[1]);
      }
    }
  }
}

// The rounded sums to `out`. `patches`: kPatchesBytes.
template <class T, class Shape, bool kVectors>
__device__ inline void store_tile(const typename Shape::Sums& sums, float* patches, void* out, int pixels, int outputs,
                                  int first_row, int first_col) {
  const WarpPatch<Shape> patch(patches);
  const Channels c = patch.channels(first_col, outputs);
#pragma unroll
  for (int i = 0; i < Shape::kWarpRows / kPatchRows; ++i) {
    patch.spread(sums, i);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + patch.row + i * kPatchRows + 8 * half;
      if (row >= pixels || c.count == 0) continue;
      Group<T> group;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) group.v[j] = from_float<T>(patch.group(half)[j]);
      store<kVectors, T>(out, row, outputs, c, group);
    }
    __syncwarp();
  }
}

// Sums of a tile's outputs in shared memory: those of the warps down, one row of warps after another, and those of the
// chunk so far.
template <class Shape>
struct TileMoments {
  static constexpr int kWarpsDown = Shape::kTileRows / Shape::kWarpRows;
  static constexpr int kWarpFloats = kMoments * Shape::kTileCols;
  static constexpr int kFoundBytes = kWarpsDown * kWarpFloats * static_cast<int>(sizeof(float));
  static constexpr int kChunkBytes = kWarpFloats * static_cast<int>(sizeof(float));

  float* found;  // kFoundBytes, of one tile
  float* chunk;  // kChunkBytes, read and written by the thread of an output alone

  // How many of `rows` rows of the tile a row of warps has.
  __device__ static int rows_of(int down, int rows) {
    const int left = rows - down * Shape::kWarpRows;
    return left < 0 ? 0 : left < Shape::kWarpRows ? left : Shape::kWarpRows;
  }
};

// What this warp has of a tile of which `rows` rows are pixels: origin, sum and squares of each of its outputs.
template <class Shape>
__device__ inline void find_warp_moments(const typename Shape::Sums& sums, const TileMoments<Shape>& moments,
                                         int rows) {
  const int lane = Shape::lane(), down = Shape::warp() / Shape::kWarpsAcross;
  const int count =
      TileMoments<Shape>::rows_of(down, rows) - lane / 4;  // this lane's row 8 * i exists if 8 * i < count
  const float share = 1.f / static_cast<float>(TileMoments<Shape>::rows_of(down, rows));
  if (TileMoments<Shape>::rows_of(down, rows) == 0) return;
  float* to = moments.found + down * TileMoments<Shape>::kWarpFloats + Shape::warp_col() + lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < Shape::kWarpCols / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float total = 0.f, sum = 0.f, squares = 0.f;
#pragma unroll
      for (int i = 0; i < Shape::kWarpRows / 8; ++i) total += 8 * i < count ? sums.v[i / 2][j][i % 2 * 2 + e] : 0.f;
      const float origin = finite_or_zero(sum_over_rows(total) * share);
#pragma unroll
      for (int i = 0; i < Shape::kWarpRows / 8; ++i) {
        const float away = 8 * i < count ? sums.v[i / 2][j][i % 2 * 2 + e] - origin : 0.f;
        sum += away;
        squares = fmaf(away, away, squares);
      }
      sum = sum_over_rows(sum);
      squares = sum_over_rows(squares);
      if (lane / 4 != 0) continue;
      to[8 * j + e] = origin;
      to[8 * j + e + Shape::kTileCols] = sum;
      to[8 * j + e + 2 * Shape::kTileCols] = squares;
    }
  }
}

// The warps' sums to those of the chunk, which begins with this tile if it is `first`: threads of the first kTileCols,
// one an output.
template <class Shape>
__device__ inline void add_to_chunk(const TileMoments<Shape>& moments, int rows, bool first) {
  constexpr int kCols = Shape::kTileCols;
  const float* found = moments.found + threadIdx.x;
  float* chunk = moments.chunk + threadIdx.x;
  const float origin = first ? found[0] : chunk[0];
  float sum = first ? 0.f : chunk[kCols], squares = first ? 0.f : chunk[2 * kCols];
#pragma unroll
  for (int down = 0; down < TileMoments<Shape>::kWarpsDown; ++down) {
    const int count = TileMoments<Shape>::rows_of(down, rows);
    if (count == 0) break;
    const float* of_warp = found + down * TileMoments<Shape>::kWarpFloats;
    const float away = of_warp[0] - origin, more = static_cast<float>(count) * away;
    squares += of_warp[2 * kCols] + away * (2.f * of_warp[kCols] + more);
    sum += of_warp[kCols] + more;
  }
  chunk[0] = origin;
  chunk[kCols] = sum;
  chunk[2 * kCols] = squares;
}

// The sums of chunk `index` to `partial`, [chunks, 3, outputs]; the same threads.
template <class Shape>
__device__ inline void store_chunk_moments(const TileMoments<Shape>& moments, float* partial, int64_t index,
                                           int outputs, int first_col) {
  const int output = first_col + static_cast<int>(threadIdx.x);
  if (output >= outputs) return;
#pragma unroll
  for (int i = 0; i < kMoments; ++i) {
    partial[(index * kMoments + i) * outputs + output] = moments.chunk[i * Shape::kTileCols + threadIdx.x];
  }
}

}  // namespace resnet_fused::cuda
