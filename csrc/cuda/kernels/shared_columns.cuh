// A matrix in shared memory whose columns are multiplied: the reduction runs down its rows, which lie as they do in
// memory.
//
// It is cut into panels of 128 bytes of every row, each a matrix as in shared_matrix.cuh, one behind the other.
// ldmatrix transposes 16-bit values on the way to a fragment; of 32-bit ones, which it cannot, lanes load words.
#pragma once

#include "conv_tile.cuh"

namespace resnet_fused::cuda {

template <class T>
constexpr int kPanelColumns = kRowBytes / static_cast<int>(sizeof(T));

// Rows of a reduction that one fragment takes.
template <class T>
constexpr int kFragmentDepth = 32 / static_cast<int>(sizeof(T));

// The chunks of a tile [kRows, kColumns] that one thread of a block has: all of one column of chunks.
template <class T, int kRows, int kColumns>
struct TileChunks {
  static constexpr int kAcross = kColumns / kChunkElements<T>;
  static constexpr int kRowsAtOnce = kConvThreads / kAcross;
  static constexpr int kPerThread = kRows / kRowsAtOnce;
  static constexpr int kBytes = kRows * kColumns * static_cast<int>(sizeof(T));
  static_assert(kColumns % kPanelColumns<T> == 0 && kRows % kRowsAtOnce == 0 && kConvThreads % kAcross == 0);

  // The first, and where in shared memory it lies: the others are kRowsAtOnce rows apart. Computed where they are asked
  // for, once a step, see anew().
  __device__ static int row() { return anew(static_cast<int>(threadIdx.x)) / kAcross; }
  __device__ static int column() { return anew(static_cast<int>(threadIdx.x)) % kAcross * kChunkElements<T>; }
  __device__ static int offset() {
    const int thread = anew(static_cast<int>(threadIdx.x)), chunk = thread % kAcross;
    return chunk / kChunks * (kRows * kRowBytes) + chunk_offset(thread / kAcross, chunk % kChunks);
  }
  static constexpr int kApart = kRowsAtOnce * kRowBytes;  // in shared memory
  static_assert(kRowsAtOnce % 8 == 0);                    // as rows of all chunks of a thread turn alike
};

// Rows of a matrix in memory, [depth, columns], of which a tile has kRows and, from `first` on, kColumns of each.
template <class T, int kRows, int kColumns, bool kVectors>
class MatrixTile {
  using Mine = TileChunks<T, kRows, kColumns>;

 public:
  __device__ MatrixTile(const void* matrix, int depth, int columns, int first)
      : matrix_(static_cast<const T*>(matrix)), depth_(depth), columns_(columns), first_(first) {}

  // The rows from `first` on, zeros where there are none.
  __device__ void copy(SharedAddress to, int first) const {
    const int first_row = first + Mine::row(), column = first_ + Mine::column();
    to += Mine::offset();
#pragma unroll
    for (int i = 0; i < Mine::kPerThread; ++i) {
      const int row = first_row + i * Mine::kRowsAtOnce;
      const bool there = row < depth_ && column < columns_;
      const T* from = there ? matrix_ + (row * columns_ + column) : matrix_;
      if constexpr (kVectors) {
        copy_async(to + i * Mine::kApart, from, there);
      } else {
        copy_elements<T>(to + i * Mine::kApart, 0, there ? columns_ - column : 0, [&](int j) { return from[j]; });
      }
    }
  }

 private:
  const T* matrix_;
  int depth_, columns_, first_;
};

// Left operand: a warp's rows of a matrix as in shared_matrix.cuh, from `first` on.
template <class T>
class RowFragments {
 public:
  __device__ RowFragments(SharedAddress matrix, int first)
      : lane_(anew(static_cast<int>(threadIdx.x)) % kWarpThreads), at_(matrix + (first + lane_ % 16) * kRowBytes) {}

  // Of 16 rows from 16*i on, for step `step` of the reduction.
  __device__ void load(uint32_t (&to)[4], int step, int i) const {
    load_matrices(to, at_ + 16 * i * kRowBytes + ((2 * step + lane_ / 16) ^ (lane_ % 8)) * kChunkBytes);
  }

 private:
  int lane_;
  SharedAddress at_;
};

// Left or right operand: a warp's columns from `first` on, which lie within a panel, of a tile of kRows rows.
template <class T, int kRows, bool kLeft>
class ColumnFragments {
 public:
  __device__ ColumnFragments(SharedAddress matrix, int first)
      : lane_(anew(static_cast<int>(threadIdx.x)) % kWarpThreads),
        at_(matrix + first / kPanelColumns<T> * (kRows * kRowBytes)),
        column_(first % kPanelColumns<T>) {}

  // Of 16 columns from 16*i on. The halves of a left fragment's columns are words 0 and 1, those of its depth 0 and 2;
  // of a right one the other way round.
  __device__ void load(uint32_t (&to)[4], int step, int i) const {
    const int lane = lane_;
    if constexpr (sizeof(T) == 2) {
      const int half = kLeft ? lane / 8 % 2 : lane / 16;
      const int deep = kLeft ? lane / 16 * 8 + lane % 8 : lane % 16;
      const int chunk = column_ / 8 + 2 * i + half;
      load_matrices_transposed(to, at_ + (16 * step + deep) * kRowBytes + (chunk ^ (lane % 8)) * kChunkBytes);
    } else {
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        const int half = kLeft ? word % 2 : word / 2, deeper = kLeft ? word / 2 : word % 2;
        const int row = 8 * step + 4 * deeper + lane % 4, column = column_ + 16 * i + 8 * half + lane / 4;
        to[word] = load_word(at_ + chunk_offset(row, column / 4) + column % 4 * 4);
      }
    }
  }

 private:
  int lane_;
  SharedAddress at_;
  int column_;
};

// sums += left * right over kSteps fragments of the reduction.
template <class T, int kSteps, int kRows, int kCols, class Left, class Right>
__device__ inline void multiply_fragments(WarpSums<kRows, kCols>& sums, const Left& left, const Right& right) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t columns[kCols / 16][4];
#pragma unroll
    for (int j = 0; j < kCols / 16; ++j) {
      right.load(columns[j], step, j);
      round_fragment<T>(columns[j]);
    }
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i) {
      uint32_t rows[4];
      left.load(rows, step, i);
      round_fragment<T>(rows);
#pragma unroll
      for (int j = 0; j < kCols / 8; ++j) {
        const uint32_t pair[2] = {columns[j / 2][j % 2 * 2], columns[j / 2][j % 2 * 2 + 1]};
        multiply<T>(sums.v[i][j], rows, pair);
      }
    }
  }
}

}  // namespace resnet_fused::cuda
