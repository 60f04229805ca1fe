// The backward of a 1x1 convolution as its stages know it, and how a panel of the input's gradient, summed in the
// first-level cache, gets to memory: with another path's gradient added, or through the ReLU before.
#pragma once

#include "conv1x1_gradient.h"

namespace resnet_fused::cpu {

// What is added to the input's gradient from another path: the pixels [::stride, ::stride] of it.
struct Added {
  const float* residual;  // [rows of it, C] or null
  const uint8_t* mask;    // or null
  int64_t H, W, stride_h, stride_w;
  int64_t gap = 0;  // between the channels of a pixel and those of the next

  bool dense() const { return stride_h == 1 && stride_w == 1; }

  // The row of the residual that belongs to a row of the gradient, or -1.
  RESNET_FUSED_INLINE int64_t source(int64_t row) const {
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
  int64_t gap;    // of grad_x, as Activation's
  bool through;   // grad_x is to go through the ReLU of a lazy input, and its sums are wanted; with a residual, what
                  // goes to memory is that and the scale of the input times it
  bool weight_grad, sum_dz;
  bool stream;  // grad_x past the caches
  int64_t rows, K, C, panel, panels;
  int64_t most_sums = int64_t(1) << 21;  // floats of the weight's gradient in all chunks of rows

  static constexpr int64_t kPart = 28, kMost = 4;  // rows that are written at a time; so often at most in a tile
  // Rows of a product of the input's gradient: a few, whose dz stays in the first-level cache, but where the weight
  // fills the second-level one, all of a tile, which then reads it once.
  int64_t part() const { return K * C > (int64_t(96) << 10) ? tile() : kPart; }

  // Rows of a tile: many, where each adds to all sums of the weight's gradient, but within the second-level cache.
  int64_t tile() const {
    constexpr int64_t kFloats = int64_t(160) << 10;
    return std::clamp(kFloats / (pitch_of(K) + pitch_of(C)) / kPart, int64_t(1), weight_grad ? kMost : 1) * kPart;
  }
  int64_t pitch() const { return C + gap; }
  bool reads_input() const { return weight_grad || coupling || through; }
  int64_t scratch() const { return tile() * (pitch_of(K) + pitch_of(C)) + 2 * part() * panel; }
};

// What a unit of work sums: [panels of all channels][K][panel], [C] each and [K].
struct BackwardSums {
  float* weight = nullptr;
  double *sum_g = nullptr, *sum_gx = nullptr, *sum_dz = nullptr;
};

// The panel's rows of y, from where they are summed, to grad_x; the columns [c, c + lanes of V), column j of y.
template <class V, bool scaled>
RESNET_FUSED_INLINE void finish_through(const Conv1x1Backward& p, const float* y, const float* activation,
                                        int64_t pitch, int64_t row, int64_t rows, int64_t c, const BackwardSums& sums) {
  V mean, scale, total = {}, product = {}, value, x;
  const V zero = {};
  load_lanes(mean, p.mean + c), load_lanes(scale, p.input.scale + c);
  for (int64_t r = 0; r < rows; ++r) {
    load_lanes(value, y + r * p.panel), load_lanes(x, activation + r * pitch);
    value = x <= zero ? zero : value;
    load_lanes(x, p.input.x + p.input.pixels.source(row + r) * p.input.pitch() + c);
    total += value, product += value * (x - mean);
    if constexpr (scaled) {
      load_lanes(x, p.added.residual + (row + r) * (p.C + p.added.gap) + c);
      value = x + scale * value;
    }
    store_lanes(p.grad_x + (row + r) * p.pitch() + c, value);
  }
  constexpr int64_t lanes = sizeof(V) / sizeof(float);
  float found[2][lanes];
  store_lanes(found[0], total), store_lanes(found[1], product);
  for (int64_t i = 0; i < lanes; ++i) sums.sum_g[c + i] += found[0][i], sums.sum_gx[c + i] += found[1][i];
}

// Past the caches, which an output larger than they are would only empty: no line is read before it is written.
template <class V>
RESNET_FUSED_INLINE void stream_lanes(float* p, const V& v) {
#ifdef RESNET_FUSED_LEVEL_512
  if constexpr (sizeof(V) == 64) {
    asm("vmovntps %1, %0" : "=m"(*reinterpret_cast<V*>(p)) : "v"(v));
    return;
  }
#endif
  store_lanes(p, v);
}

// `sources`: of every row that of the residual, or -1; null: the same rows.
template <class V, bool stream>
RESNET_FUSED_INLINE void finish_added(const Conv1x1Backward& p, const float* y, const int64_t* sources, int64_t row,
                                      int64_t rows, int64_t c) {
  for (int64_t r = 0; r < rows; ++r) {
    V value, other;
    load_lanes(value, y + r * p.panel);
    const int64_t from = !p.added.residual ? -1 : sources ? sources[r] : row + r;
    if (from >= 0) {
      load_lanes(other, p.added.residual + from * (p.C + p.added.gap) + c);
      if (p.added.mask) mask_lanes(other, p.added.mask + from * mask_bytes(p.C), c);
      value += other;
    }
    if constexpr (stream) {
      stream_lanes(p.grad_x + (row + r) * p.pitch() + c, value);
    } else {
      store_lanes(p.grad_x + (row + r) * p.pitch() + c, value);
    }
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

}  // namespace resnet_fused::cpu
