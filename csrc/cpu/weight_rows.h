// A weight [K, C] times a symmetric matrix [C, C] by blocks of rows, for the ops on a Gram join's small matrices.
//
// Everything lies in panels of one cache line a row: element (r, c) of a matrix of `rows` rows is at
// (c - c % kPanel) * rows + r * kPanel + c % kPanel. Columns beyond C are 0, so that loops over a row take whole lines.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "panels.h"

namespace resnet_fused::cpu {

inline constexpr int64_t kBlockRows = 48;  // rows of W in one unit of work
inline constexpr int64_t kTileRows = 6;    // of those in registers at a time
inline constexpr int64_t kUnit = 1 << 18;  // multiply-adds that are worth waking a thread for

template <class A>
int64_t padded(int64_t channels) {
  return (channels + kPanel<A> - 1) / kPanel<A> * kPanel<A>;
}

inline int64_t grain(int64_t work) { return std::max<int64_t>(1, kUnit / std::max<int64_t>(work, 1)); }

// Two matrices of kBlockRows rows for the block at work. They begin as zeros: tiles read and write past the last row.
template <class A>
struct BlockBuffers {
  AlignedArray<A> first, second;

  explicit BlockBuffers(int64_t columns)
      : first(aligned_array<A>(kBlockRows * columns)), second(aligned_array<A>(kBlockRows * columns)) {
    std::fill_n(first.get(), kBlockRows * columns, A(0));
  }
};

// f(first row, number of rows, buffers) for the blocks of K rows, on every thread.
template <class A, class F>
void parallel_row_blocks(int64_t K, int64_t C, const F& f) {
  const int64_t blocks = (K + kBlockRows - 1) / kBlockRows;
  torch::stable::parallel_for(0, blocks, grain(kBlockRows * C * C), [&](int64_t begin, int64_t end) {
    BlockBuffers<A> buffers(padded<A>(C));
    for (int64_t row = begin * kBlockRows; row < std::min(K, end * kBlockRows); row += kBlockRows) {
      f(row, std::min(kBlockRows, K - row), buffers);
    }
  });
}

// f(first column) for the panels of C by C, on every thread; `work` is what an element costs.
template <class A, class F>
void parallel_panels(int64_t C, int64_t work, const F& f) {
  constexpr int64_t P = kPanel<A>;
  torch::stable::parallel_for(0, padded<A>(C) / P, grain(P * C * work), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) f(panel * P);
  });
}

// packed(r, c) = f(r, c) for rows by columns of a matrix of `pitch` rows.
template <class A, class F>
RESNET_FUSED_INLINE void pack_panels(A* __restrict packed, int64_t pitch, int64_t rows, int64_t columns, const F& f) {
  constexpr int64_t P = kPanel<A>;
  int64_t c = 0;
  for (; c + P <= columns; c += P) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < P; ++i) packed[c * pitch + r * P + i] = f(r, c + i);
    }
  }
  for (int64_t r = 0; r < rows && c < columns; ++r) {
    for (int64_t i = 0; i < P; ++i) packed[c * pitch + r * P + i] = c + i < columns ? f(r, c + i) : A(0);
  }
}

// Rows of `from` are `stride` apart.
template <class T, class A>
RESNET_FUSED_CLONES void pack_rows(A* packed, int64_t pitch, const T* from, int64_t stride, int64_t rows,
                                   int64_t columns) {
  pack_panels(packed, pitch, rows, columns, [&](int64_t r, int64_t c) { return load(from + r * stride + c); });
}

// y = w s, where w has `pitch` rows, y kBlockRows, and s is C by C. Rows up to the next multiple of kTileRows are
// read and written.
template <class A>
RESNET_FUSED_CLONES void multiply_rows(A* __restrict y, const A* __restrict w, int64_t pitch, const A* __restrict s,
                                       int64_t rows, int64_t C) {
  constexpr int64_t P = kPanel<A>;
  using Vector = typename HalfPanel<A>::type;
  for (int64_t j = 0; j < C; j += P) {
    for (int64_t r = 0; r < rows; r += kTileRows) {
      RegisterTile<A, kTileRows> sums;
      for (int64_t c = 0; c < C; c += P) {
        sums.template accumulate<P, 1>(w + c * pitch + r * P, s + j * C + c * P, std::min(P, C - c));
      }
      Vector* target = reinterpret_cast<Vector*>(y + j * kBlockRows + r * P);
      for (int64_t i = 0; i < kTileRows; ++i) {
        target[2 * i] = sums.low[i];
        target[2 * i + 1] = sums.high[i];
      }
    }
  }
}

// Sum of x * y over the columns of one row each, in float64; x and y may lie in matrices of different numbers of rows.
// Four conversions side by side are what GCC 12 makes one instruction of; plain loops take more than twice as long.
template <class A>
RESNET_FUSED_INLINE double dot_rows(const A* __restrict x, int64_t x_pitch, const A* __restrict y, int64_t y_pitch,
                                    int64_t C) {
  constexpr int64_t P = kPanel<A>, parts = P / 4;
  typedef double Wide __attribute__((vector_size(32)));
  Wide sums[parts] = {};
  for (int64_t c = 0; c < C; c += P, x += P * x_pitch, y += P * y_pitch) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < parts; ++i) {
      const A *p = x + 4 * i, *q = y + 4 * i;
      const Wide left = {p[0], p[1], p[2], p[3]}, right = {q[0], q[1], q[2], q[3]};
      sums[i] += left * right;
    }
  }
  for (int64_t i = 1; i < parts; ++i) sums[0] += sums[i];
  return (sums[0][0] + sums[0][1]) + (sums[0][2] + sums[0][3]);
}

}  // namespace resnet_fused::cpu
