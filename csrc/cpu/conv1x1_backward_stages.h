// Both gradients of a 1x1 convolution from one read of its lazy gradient, a tile of rows at a time.
#pragma once

#include "conv1x1_gradient.h"

namespace resnet_fused::cpu {

// What is added to the input's gradient from another path: the pixels [::stride, ::stride] of it.
struct Added {
  const float* residual;  // [rows of it, C] or null
  const uint8_t* mask;    // or null
  int64_t H, W, stride_h, stride_w;

  // The row of the residual that belongs to a row of the gradient, or -1.
  RESNET_FUSED_INLINE int64_t source(int64_t row) const {
    if (stride_h == 1 && stride_w == 1) return row;
    const int64_t line = row / W, w = row - line * W, sample = line / H, h = line - sample * H;
    if (h % stride_h || w % stride_w) return -1;
    const int64_t height = (H + stride_h - 1) / stride_h, width = (W + stride_w - 1) / stride_w;
    return (sample * height + h / stride_h) * width + w / stride_w;
  }
};

struct Conv1x1Backward {
  Gradient gradient;
  Activation input;                 // x null where nothing needs it
  const float *weight, *packed;     // [K, C], [panels][K][panel]; null: dz itself is the product
  const float *coupling, *coupled;  // [C, C], [panels][C][panel], or null
  const float *constant, *mean;     // [C] or null
  Added added;
  float* grad_x;  // [rows, C] or null
  bool through;   // grad_x is to go through the ReLU of a lazy input, and its sums are wanted
  bool weight_grad, sum_dz;
  int64_t rows, K, C, panel, panels;

  static constexpr int64_t kPart = 28;  // rows of a product of the input's gradient: see Conv1x1::kTile

  // Rows of a tile: many, since each adds to all sums of the weight's gradient, but within the second-level cache.
  int64_t tile() const {
    constexpr int64_t kFloats = int64_t(160) << 10, kMost = 4;
    return std::clamp(kFloats / (pitch_of(K) + pitch_of(C)) / kPart, int64_t(1), kMost) * kPart;
  }
  bool reads_input() const { return weight_grad || coupling || through; }
  int64_t scratch() const { return tile() * (pitch_of(K) + pitch_of(C)) + 2 * kPart * panel; }
};

// Several at once: of the gradient, z, x and the residual.
struct Fetch {
  Ahead g, z, x, residual;

  RESNET_FUSED_INLINE void operator()() { g(), z(), x(), residual(); }
};

// What a unit of work sums: [panels of all channels][K][panel], [C] each and [K].
struct BackwardSums {
  float* weight = nullptr;
  double *sum_g = nullptr, *sum_gx = nullptr, *sum_dz = nullptr;
};

// The panel's rows of y, from where they are summed, to grad_x; the columns [c, c + lanes of V), column j of y.
template <class V>
RESNET_FUSED_INLINE void finish_through(const Conv1x1Backward& p, const float* y, const float* activation,
                                        int64_t pitch, int64_t row, int64_t rows, int64_t c, const BackwardSums& sums) {
  V mean, total = {}, product = {}, value, x;
  const V zero = {};
  load_lanes(mean, p.mean + c);
  for (int64_t r = 0; r < rows; ++r) {
    load_lanes(value, y + r * p.panel), load_lanes(x, activation + r * pitch);
    value = x <= zero ? zero : value;
    load_lanes(x, p.input.x + p.input.pixels.source(row + r) * p.C + c);
    store_lanes(p.grad_x + (row + r) * p.C + c, value);
    total += value, product += value * (x - mean);
  }
  constexpr int64_t lanes = sizeof(V) / sizeof(float);
  float found[2][lanes];
  store_lanes(found[0], total), store_lanes(found[1], product);
  for (int64_t i = 0; i < lanes; ++i) sums.sum_g[c + i] += found[0][i], sums.sum_gx[c + i] += found[1][i];
}

template <class V>
RESNET_FUSED_INLINE void finish_added(const Conv1x1Backward& p, const float* y, int64_t row, int64_t rows, int64_t c) {
  for (int64_t r = 0; r < rows; ++r) {
    V value, other;
    load_lanes(value, y + r * p.panel);
    const int64_t from = p.added.residual ? p.added.source(row + r) : -1;
    if (from >= 0) {
      load_lanes(other, p.added.residual + from * p.C + c);
      if (p.added.mask) mask_lanes(other, p.added.mask + from * mask_bytes(p.C), c);
      value += other;
    }
    store_lanes(p.grad_x + (row + r) * p.C + c, value);
  }
}

template <class V>
RESNET_FUSED_INLINE void add_terms(const Conv1x1Backward& p, float* y, const float* more, int64_t rows, int64_t c) {
  V constant = {}, value, other;
  if (p.constant) load_lanes(constant, p.constant + c);
  for (int64_t r = 0; r < rows; ++r) {
    load_lanes(value, y + r * p.panel);
    if (p.coupling) load_lanes(other, more + r * p.panel), value += other;
    store_lanes(y + r * p.panel, V(value + constant));
  }
}

// A panel of the input's gradient, [c, c + columns), for rows whose dz and x^ are in the cache.
template <class L>
RESNET_FUSED_INLINE void input_panel(const Conv1x1Backward& p, const float* dz, const float* activation, int64_t pitch,
                                     int64_t row, int64_t rows, int64_t c, int64_t first, float* y, Fetch& ahead,
                                     const BackwardSums& sums) {
  const int64_t panel = c / L::panel, columns = std::min(L::panel, p.C - c), K = p.gradient.K;
  const int64_t vectors = columns / L::lanes * L::lanes, dz_pitch = pitch_of(K);
  float* more = y + Conv1x1Backward::kPart * L::panel;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < columns; j += 16) __builtin_prefetch(p.grad_x + (row + r) * p.C + c + j, 1);
  }
  if (p.packed) {
    multiply_rows<L>(rows, dz, dz_pitch, p.packed + panel * K * L::panel, L::panel, K, y, L::panel, ahead);
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < columns; ++j) y[r * L::panel + j] = dz[r * dz_pitch + c + j];
    }
  }
  if (p.coupling) {
    multiply_rows<L>(rows, activation - (c - first), pitch, p.coupled + panel * p.C * L::panel, L::panel, p.C, more,
                     L::panel);
  }
  const auto finish = [&]<class V>(int64_t j, const V*) __attribute__((always_inline)) {
    if (p.coupling || p.constant) add_terms<V>(p, y + j, more + j, rows, c + j);
    if (p.through) {
      finish_through<V>(p, y + j, activation + j, pitch, row, rows, c + j, sums);
    } else {
      finish_added<V>(p, y + j, row, rows, c + j);
    }
  };
  for (int64_t j = 0; j < vectors; j += L::lanes) finish(j, static_cast<const typename L::Vector*>(nullptr));
  for (int64_t j = vectors; j < columns; ++j) finish(j, static_cast<const float*>(nullptr));
}

template <class L>
RESNET_FUSED_INLINE void sum_rows(const float* dz, int64_t pitch, int64_t rows, int64_t K, double* sums) {
  for (int64_t k = 0; k < K; ++k) {
    float sum = 0;
    for (int64_t r = 0; r < rows; ++r) sum += dz[r * pitch + k];
    sums[k] += sum;
  }
}

// The sums of the weight's gradient over a tile's rows, by blocks of outputs whose gradients stay in the first cache.
template <class L>
RESNET_FUSED_INLINE void add_to_weight(const Conv1x1Backward& p, const float* dz, const float* activation, int64_t rows,
                                       int64_t first, int64_t end, bool add, float* weight) {
  const int64_t blocks = (p.K + 4 * L::rows - 1) / (4 * L::rows), dz_pitch = pitch_of(p.K), pitch = pitch_of(p.C);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t k = p.K * block / blocks, outputs = p.K * (block + 1) / blocks - k;
    for (int64_t panel = first; panel < end; ++panel) {
      multiply_columns<L>(outputs, dz + k, dz_pitch, activation + (panel - first) * L::panel, pitch, rows, add,
                          weight + (panel * p.K + k) * L::panel);
    }
  }
}

// What the products of a part of a tile fetch meanwhile: its share of the next tile, and the next part's residual.
template <class L>
RESNET_FUSED_INLINE Fetch fetch_after(const Conv1x1Backward& p, int64_t row, int64_t rows, int64_t part, int64_t parts,
                                      int64_t calls) {
  constexpr int64_t kFloats = int64_t(64) << 10;  // more would displace what is at work
  const int64_t later = std::min(rows, p.rows - row - rows), begin = later * part / parts;
  int64_t count = later * (part + 1) / parts - begin;
  const int64_t read = p.K * (p.gradient.b ? 2 : 1) + (p.reads_input() ? p.C : 0), next = row + rows + begin;
  if (rows * read > kFloats) count = 0;
  const bool dense = p.reads_input() && p.input.pixels.dense();
  const int64_t after = row + (part + 1) * Conv1x1Backward::kPart;
  const bool adds = p.added.residual && p.added.stride_h == 1 && p.added.stride_w == 1;
  const int64_t added = adds ? std::clamp(p.rows - after, int64_t(0), Conv1x1Backward::kPart) : 0;
  return {{p.gradient.g + next * p.K, count * p.K, calls},
          {p.gradient.z + next * p.K, p.gradient.b ? count * p.K : 0, calls},
          {p.input.x + next * p.C, dense ? count * p.C : 0, calls},
          {p.added.residual + after * p.C, added * p.C, calls}};
}

// The rows of a tile for the panels [first, end) of channels. `add`: to what the weight's sums hold already.
template <class L>
RESNET_FUSED_INLINE void backward_tile(const Conv1x1Backward& p, int64_t row, int64_t rows, int64_t first, int64_t end,
                                       bool add, float* scratch, const BackwardSums& sums) {
  const int64_t dz_pitch = pitch_of(p.K), pitch = pitch_of(p.C), c = first * L::panel;
  const int64_t width = std::min(p.C, end * L::panel) - c;
  float *dz = scratch, *activation = dz + p.tile() * dz_pitch, *y = activation + p.tile() * pitch;
  write_gradient<L>(p.gradient, row, rows, dz, dz_pitch);
  if (p.reads_input()) write_activation<L>(p.input, row, rows, c, width, activation, pitch);
  if (sums.sum_dz) sum_rows<L>(dz, dz_pitch, rows, p.K, sums.sum_dz);
  if (p.weight_grad) add_to_weight<L>(p, dz, activation, rows, first, end, add, sums.weight);
  if (!p.grad_x) return;
  const int64_t parts = (rows + Conv1x1Backward::kPart - 1) / Conv1x1Backward::kPart;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t begin = part * Conv1x1Backward::kPart, count = std::min(Conv1x1Backward::kPart, rows - begin);
    Fetch ahead = fetch_after<L>(p, row, rows, part, parts, (end - first) * (count / L::rows + 1));
    for (int64_t panel = first; panel < end; ++panel) {
      const float* read = activation + begin * pitch + (panel - first) * L::panel;
      input_panel<L>(p, dz + begin * dz_pitch, read, pitch, row + begin, count, panel * L::panel, c, y, ahead, sums);
    }
  }
}

template <class L>
RESNET_FUSED_INLINE void pack_inputs(const Conv1x1Backward& p, int64_t panel, float* packed, float* coupled) {
  const int64_t c = panel * L::panel, columns = std::min(L::panel, p.C - c);
  if (p.weight) pack_panel<L>(p.weight + c, columns, 1, p.K, p.C, packed);
  if (p.coupling) pack_panel<L>(p.coupling + c, columns, 1, p.C, p.C, coupled);
}

}  // namespace resnet_fused::cpu
