// A 1x1 convolution's rows in tiles: the input's values written to the second-level cache as they are applied, the
// products of a panel of outputs in the first, and the sums of their statistics there.
#pragma once

#include "conv1x1_values.h"

namespace resnet_fused::cpu {

struct Conv1x1 {
  Activation input;
  const float *weight, *packed;  // [K, C], [panels][C][panel]
  float* z;                      // [rows, K]
  int64_t rows, C, K, panel, panels;

  static constexpr int64_t kTile = 28, kBlock = 9 * kTile;  // rows, in the first-level cache up to 256 channels

  int64_t pitch() const { return pitch_of(C); }
  int64_t scratch() const { return kTile * (pitch() + panel); }
};

// Of a block of tiles, [K] each up to whole panels: sums of differences to a pivot and of their squares, as
// block_moments in moments.h makes them. The pivot is the mean of the chunk's first tile, then that of the block
// before, which costs no pass: where it is off, the means of both blocks differ as much, and the variance is of that
// size.
struct BlockSums {
  float *pivot = nullptr, *sum = nullptr, *square = nullptr;  // null: not asked for
  bool without_pivot = false, first_tile = false;
};

// inf and NaN stay with their own rows.
template <class V>
RESNET_FUSED_INLINE void keep_finite(V& v) {
  const V zero = {};
  v = v - v == zero ? v : zero;
}

// Copies a panel's vector of a column to out, rows `pitch` apart, and sums it.
template <class L>
RESNET_FUSED_INLINE void sum_vector(const float* y, int64_t rows, const BlockSums& sums, int64_t k, float* out,
                                    int64_t pitch) {
  using V = typename L::Vector;
  V about, total[2] = {}, square[2] = {}, value;
  if (sums.without_pivot) {
    load_vector<L>(about, y), keep_finite(about);
    for (int64_t r = 0; r < rows; ++r) {
      load_vector<L>(value, y + r * L::panel);
      total[0] += value - about;
    }
    about += total[0] * (1.0f / static_cast<float>(rows)), keep_finite(about), total[0] = V{};
    store_vector<L>(sums.pivot + k, about);
  } else {
    load_vector<L>(about, sums.pivot + k);
  }
  if (!sums.first_tile) load_vector<L>(total[0], sums.sum + k), load_vector<L>(square[0], sums.square + k);
  const auto take = [&](int64_t r, V& t, V& s) __attribute__((always_inline)) {
    load_vector<L>(value, y + r * L::panel);
    store_vector<L>(out + r * pitch, value);
    value -= about;
    t += value, s += value * value;
  };
  int64_t r = 0;
  for (; r + 2 <= rows; r += 2) take(r, total[0], square[0]), take(r + 1, total[1], square[1]);
  if (r < rows) take(r, total[0], square[0]);
  store_vector<L>(sums.sum + k, total[0] + total[1]), store_vector<L>(sums.square + k, square[0] + square[1]);
}

// out[r][0 .. columns) = the rows of a panel.
template <class L>
RESNET_FUSED_INLINE void copy_panel(const float* y, int64_t rows, int64_t columns, float* out, int64_t pitch) {
  const int64_t vectors = columns / L::lanes * L::lanes;
  for (int64_t r = 0; r < rows; ++r, y += L::panel, out += pitch) {
    for (int64_t j = 0; j < vectors; j += L::lanes) {
      typename L::Vector value;
      load_vector<L>(value, y + j);
      store_vector<L>(out + j, value);
    }
    for (int64_t j = vectors; j < columns; ++j) out[j] = y[j];
  }
}

// The rows of a panel to `out`; where that is not as wide, by way of the scratch `spare`, for a row of it.
template <class L>
RESNET_FUSED_INLINE void finish_panel(const float* y, int64_t rows, int64_t columns, const BlockSums& sums, int64_t k,
                                      float* out, int64_t pitch) {
  if (!sums.pivot || columns < L::panel) copy_panel<L>(y, rows, columns, out, pitch);
  if (!sums.pivot) return;
  float spare[L::panel];
  for (int64_t j = 0; j < L::panel; j += L::lanes) {
    if (columns < L::panel) {
      sum_vector<L>(y + j, rows, sums, k + j, spare, 0);
    } else {
      sum_vector<L>(y + j, rows, sums, k + j, out + j, pitch);
    }
  }
}

template <class L>
RESNET_FUSED_INLINE void convolve_tile(const Conv1x1& p, int64_t row, int64_t rows, int64_t first_panel,
                                       int64_t end_panel, float* scratch, const BlockSums& sums) {
  float* y = scratch + Conv1x1::kTile * p.pitch();
  write_activation<L>(p.input, row, rows, 0, p.C, scratch, p.pitch());
  const int64_t later = p.input.pixels.dense() ? std::min(Conv1x1::kTile, p.rows - row - rows) : 0;
  const RowLines next(p.input.x + (row + rows) * p.input.pitch(), later, p.C, p.input.pitch());
  Ahead ahead(next, (end_panel - first_panel) * (rows / L::rows + 1));
  for (int64_t panel = first_panel; panel < end_panel; ++panel) {
    const int64_t k = panel * L::panel, columns = std::min(L::panel, p.K - k);
    float* out = p.z + row * p.K + k;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < columns; j += 16) __builtin_prefetch(out + r * p.K + j, 1);
    }
    multiply_rows<L>(rows, scratch, p.pitch(), p.packed + panel * p.C * L::panel, p.C, y, L::panel, ahead);
    finish_panel<L>(y, rows, columns, sums, k, out, p.K);
  }
}

template <class L>
RESNET_FUSED_INLINE void pack_outputs(const Conv1x1& p, int64_t panel, float* packed) {
  const int64_t k = panel * L::panel;
  pack_panel<L>(p.weight + k * p.C, std::min(L::panel, p.K - k), p.C, p.C, 1, packed);
}

}  // namespace resnet_fused::cpu
