// Both gradients of a 1x1 convolution in bfloat16 from one read of its lazy gradient, a tile of rows at a time.
#pragma once

#include "conv1x1_bf16_gradient.h"

#ifdef RESNET_FUSED_BF16
#include <algorithm>

namespace resnet_fused::cpu::bf16 {

// What is added to the input's gradient from another path: the pixels [::stride, ::stride] of it.
struct Added {
  const uint16_t* residual;  // [rows of it, C] or null
  const uint8_t* mask;       // or null
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

struct Backward {
  Gradient gradient;
  Activation input;                    // x null where nothing needs it
  const uint16_t *weight, *packed;     // [K, C], [panels][pairs of K][kPanel][2]; null: dz itself is the product
  const uint16_t *coupling, *coupled;  // [C, C], [panels][pairs of C][kPanel][2], or null
  const float *constant, *mean;        // [C] or null
  Added added;
  uint16_t* grad_x;  // [rows, C] or null
  bool through;      // grad_x is to go through the ReLU of a lazy input, and its sums are wanted
  bool weight_grad, sum_dz;
  int64_t rows, K, C;

  int64_t panels() const { return padded(C) / kPanel; }
  int64_t groups() const { return (K + kGroup - 1) / kGroup; }  // of outputs, for the weight's gradient
  bool reads_input() const { return weight_grad || coupling || through; }

  static constexpr int64_t kMostRows = 16 * kGroup;

  // Rows of a tile, an even number: many, since each adds to all sums of the weight's gradient, but within the
  // second-level cache.
  int64_t tile() const {
    constexpr int64_t kBytes = int64_t(640) << 10, kLeast = 2 * kGroup;
    const int64_t row = 2 * (pitch_of(K) + pitch_of(C)) + (weight_grad ? 2 * kLanes * groups() : 0);
    return std::clamp(kBytes / row / kLeast, int64_t(1), kMostRows / kLeast) * kLeast;
  }
  // Elements of the scratch: dz, x^, dz by pairs of rows, and a panel of x^ by pairs of rows.
  int64_t dz_size() const { return tile() * pitch_of(K); }
  int64_t activation_size() const { return reads_input() ? tile() * pitch_of(C) : 0; }
  int64_t pairs_size() const { return weight_grad ? tile() * kLanes * groups() : 0; }
  int64_t scratch() const { return dz_size() + activation_size() + pairs_size() + tile() * kPanel; }
};

// What a unit of work sums: [panels of all channels][K][kPanel]; [C] each up to whole panels, of a tile; and [K].
struct Sums {
  float *weight = nullptr, *sum_g = nullptr, *sum_gx = nullptr, *sum_dz = nullptr;
};

// What the products of a tile fetch meanwhile: the next tile's gradient, z, x and residual.
struct Fetch {
  Ahead g, z, x, residual;

  RESNET_FUSED_BF16_INLINE void operator()() { g(), z(), x(), residual(); }
};

inline Fetch fetch_after(const Backward& p, int64_t row, int64_t rows, int64_t calls) {
  const int64_t next = row + rows, later = std::min(rows, p.rows - next);
  const bool dense = p.reads_input() && p.input.pixels.dense();
  const bool adds = p.added.residual && p.added.stride_h == 1 && p.added.stride_w == 1;
  return {{p.gradient.g + next * p.K, later * p.K, calls},
          {p.gradient.z + next * p.K, p.gradient.b || p.gradient.scale ? later * p.K : 0, calls},
          {p.input.x + next * p.C, dense ? later * p.C : 0, calls},
          {p.added.residual + next * p.C, adds ? later * p.C : 0, calls}};
}

// y where the activation let its value pass.
RESNET_FUSED_BF16_INLINE __m512 through_relu(__m512 y, __m512 activation) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(activation, _mm512_setzero_ps(), _CMP_NLE_UQ), y);
}

// The columns [c, c + kPanel) of a row of the residual, zero where they do not pass.
template <bool full>
RESNET_FUSED_BF16_INLINE __m512i added_columns(const Backward& p, int64_t from, int64_t c) {
  __mmask32 columns = full ? 0xFFFFFFFFu : columns_of(p.C - c);
  if (p.added.mask) {
    uint32_t bits = 0;
    const int64_t bytes = mask_bytes(p.C);
    std::memcpy(&bits, p.added.mask + from * bytes + c / 8, full ? 4 : std::min<int64_t>(4, bytes - c / 8));
    columns &= bits;
  }
  return _mm512_maskz_loadu_epi16(columns, p.added.residual + from * p.C + c);
}

template <int64_t R>
RESNET_FUSED_BF16_INLINE void finish_through(const Backward& p, __m512 (&y)[R][2], const uint16_t* activation,
                                             int64_t row, int64_t c, const Sums& sums) {
  const __mmask32 columns = columns_of(p.C - c);
  const __mmask16 masks[2] = {static_cast<__mmask16>(columns), static_cast<__mmask16>(columns >> 16)};
  __m512 mean[2], total[2], product[2];
#pragma GCC unroll 2
  for (int64_t j = 0; j < 2; ++j) {
    mean[j] = _mm512_maskz_loadu_ps(masks[j], p.mean + c + j * kLanes);
    total[j] = _mm512_loadu_ps(sums.sum_g + c + j * kLanes), product[j] = _mm512_loadu_ps(sums.sum_gx + c + j * kLanes);
  }
#pragma GCC unroll 16
  for (int64_t r = 0; r < R; ++r) {
    const __m512i kept = _mm512_loadu_si512(activation + r * pitch_of(p.C));
    const __m512i x = load_columns(columns, p.input.x + p.input.pixels.source(row + r) * p.C + c);
    const __m512i value = round_pair(through_relu(y[r][0], low_of(kept)), through_relu(y[r][1], high_of(kept)));
    store_columns(p.grad_x + (row + r) * p.C + c, columns, value);
    const __m512 low = low_of(value), high = high_of(value);
    total[0] = _mm512_add_ps(total[0], low), total[1] = _mm512_add_ps(total[1], high);
    product[0] = _mm512_fmadd_ps(low, _mm512_sub_ps(low_of(x), mean[0]), product[0]);
    product[1] = _mm512_fmadd_ps(high, _mm512_sub_ps(high_of(x), mean[1]), product[1]);
  }
#pragma GCC unroll 2
  for (int64_t j = 0; j < 2; ++j) {
    _mm512_storeu_ps(sums.sum_g + c + j * kLanes, total[j]), _mm512_storeu_ps(sums.sum_gx + c + j * kLanes, product[j]);
  }
}

template <int64_t R, bool full>
RESNET_FUSED_BF16_INLINE void finish_added(const Backward& p, __m512 (&y)[R][2], const int64_t* sources, int64_t row,
                                           int64_t c) {
#pragma GCC unroll 16
  for (int64_t r = 0; r < R; ++r) {
    if (sources[r] >= 0) {
      const __m512i other = added_columns<full>(p, sources[r], c);
      y[r][0] = _mm512_add_ps(y[r][0], low_of(other)), y[r][1] = _mm512_add_ps(y[r][1], high_of(other));
    }
    uint16_t* const out = p.grad_x + (row + r) * p.C + c;
    store_columns(out, full ? 0xFFFFFFFFu : columns_of(p.C - c), round_pair(y[r][0], y[r][1]));
  }
}

// R rows of a panel of the input's gradient, whose dz and x^ are in the cache; `activation`: of all channels;
// `sources`: of each row that of the residual, or -1.
template <int64_t R>
RESNET_FUSED_BF16_GROUP void input_group(const Backward& p, const uint16_t* dz, const uint16_t* activation,
                                         const int64_t* sources, int64_t row, int64_t c, const Sums& sums) {
  __m512 y[R][2] = {};
#pragma GCC unroll 16
  for (int64_t r = 0; r < R; ++r) {
    __builtin_prefetch(p.grad_x + (row + r) * p.C + c, 1);
    if (p.through) __builtin_prefetch(p.input.x + p.input.pixels.source(row + r) * p.C + c);
    if (sources[r] >= 0) __builtin_prefetch(p.added.residual + sources[r] * p.C + c);
  }
  if (p.constant) {
    const __m512 low = _mm512_maskz_loadu_ps(lanes_of(p.C - c), p.constant + c);
    const __m512 high = _mm512_maskz_loadu_ps(lanes_of(p.C - c - kLanes), p.constant + c + kLanes);
#pragma GCC unroll 16
    for (int64_t r = 0; r < R; ++r) y[r][0] = low, y[r][1] = high;
  }
  if (p.packed) {
    const int64_t pairs = pairs_of(p.K);
    multiply<R>(dz, pitch_of(p.K), p.packed + c / kPanel * pairs * 2 * kPanel, pairs, y);
  } else {
#pragma GCC unroll 16
    for (int64_t r = 0; r < R; ++r) {
      const __m512i value = _mm512_loadu_si512(dz + r * pitch_of(p.K) + c);
      y[r][0] = _mm512_add_ps(y[r][0], low_of(value)), y[r][1] = _mm512_add_ps(y[r][1], high_of(value));
    }
  }
  if (p.coupling) {
    const int64_t pairs = pairs_of(p.C);
    multiply<R>(activation, pitch_of(p.C), p.coupled + c / kPanel * pairs * 2 * kPanel, pairs, y);
  }
  if (p.through) return finish_through<R>(p, y, activation + c, row, c, sums);
  c + kPanel <= p.C ? finish_added<R, true>(p, y, sources, row, c) : finish_added<R, false>(p, y, sources, row, c);
}

template <int64_t R>
RESNET_FUSED_BF16_INLINE void input_group_of(int64_t count, const Backward& p, const uint16_t* dz,
                                             const uint16_t* activation, const int64_t* sources, int64_t row, int64_t c,
                                             const Sums& sums) {
  if constexpr (R > 0) {
    if (count == R) return input_group<R>(p, dz, activation, sources, row, c, sums);
    input_group_of<R - 1>(count, p, dz, activation, sources, row, c, sums);
  }
}

// The input's gradient for the rows of a tile and the panels [first, end).
RESNET_FUSED_BF16_INLINE void input_tile(const Backward& p, const uint16_t* dz, const uint16_t* activation, int64_t row,
                                         int64_t rows, int64_t first, int64_t end, const Sums& sums, Fetch& ahead) {
  const int64_t groups = (rows + kGroup - 1) / kGroup;
  int64_t sources[Backward::kMostRows];
  for (int64_t r = 0; r < rows; ++r) sources[r] = p.added.residual ? p.added.source(row + r) : -1;
  for (int64_t panel = first; panel < end; ++panel) {
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t begin = rows * group / groups, count = rows * (group + 1) / groups - begin;
      const uint16_t* read = p.reads_input() ? activation + begin * pitch_of(p.C) : nullptr;
      ahead();
      input_group_of<kGroup>(count, p, dz + begin * pitch_of(p.K), read, sources + begin, row + begin, panel * kPanel,
                             sums);
    }
  }
}

// dz by pairs of rows: [groups][pairs][kLanes][2], of whose lanes a group has at most kGroup. Row `rows` is there, 0.
RESNET_FUSED_BF16_INLINE void pair_gradient(const Backward& p, const uint16_t* dz, int64_t rows, uint16_t* out) {
  const int64_t pitch = pitch_of(p.K), pairs = pairs_of(rows);
  for (int64_t group = 0; group < p.groups(); ++group) {
    const uint16_t* from = dz + p.K * group / p.groups();
    for (int64_t i = 0; i < pairs; ++i, from += 2 * pitch, out += 2 * kLanes) {
      const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
      const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + pitch));
      _mm512_storeu_si512(out, interleaved(first, second));
    }
  }
}

// The sums of the weight's gradient over a tile's rows, for the panels [first, end).
RESNET_FUSED_BF16_INLINE void weight_tile(const Backward& p, const uint16_t* paired, const uint16_t* activation,
                                          int64_t rows, int64_t first, int64_t end, bool add, uint16_t* panel_pairs,
                                          float* weight, Fetch& ahead) {
  const int64_t pitch = pitch_of(p.C), pairs = pairs_of(rows);
  for (int64_t panel = first; panel < end; ++panel) {
    const uint16_t* from = activation + panel * kPanel;
    for (int64_t i = 0; i < pairs; ++i, from += 2 * pitch) {
      interleave(_mm512_loadu_si512(from), _mm512_loadu_si512(from + pitch), panel_pairs + i * 2 * kPanel);
    }
    for (int64_t group = 0; group < p.groups(); ++group) {
      const int64_t k = p.K * group / p.groups(), count = p.K * (group + 1) / p.groups() - k;
      ahead();
      weight_group_of<kGroup>(count, paired + group * pairs * 2 * kLanes, panel_pairs, pairs, add,
                              weight + (panel * p.K + k) * kPanel);
    }
  }
}

RESNET_FUSED_BF16_INLINE void add_rows(const uint16_t* dz, int64_t rows, int64_t K, float* sums) {
  const int64_t pitch = pitch_of(K);
  for (int64_t k = 0; k < padded(K); k += kLanes) {
    __m512 sum = _mm512_loadu_ps(sums + k);
    for (int64_t r = 0; r < rows; ++r) sum = _mm512_add_ps(sum, load_wide(0xFFFF, dz + r * pitch + k));
    _mm512_storeu_ps(sums + k, sum);
  }
}

// The rows of a tile for the panels [first, end) of channels. `add`: to what the weight's sums hold already.
RESNET_FUSED_BF16 inline void backward_tile(const Backward& p, int64_t row, int64_t rows, int64_t first, int64_t end,
                                            bool add, uint16_t* scratch, const Sums& sums) {
  uint16_t* const dz = scratch;
  uint16_t* const activation = dz + p.dz_size();
  uint16_t* const paired = activation + p.activation_size();
  write_gradient(p.gradient, row, rows, dz);
  if (p.reads_input()) write_activation(p.input, row, rows, activation);
  const int64_t calls = (p.weight_grad ? p.groups() : 0) + (p.grad_x ? (rows + kGroup - 1) / kGroup : 0);
  Fetch ahead = fetch_after(p, row, rows, std::max<int64_t>(calls, 1) * (end - first));
  if (sums.sum_dz) add_rows(dz, rows, p.K, sums.sum_dz);
  if (p.weight_grad) {
    if (rows % 2) {  // a pair's second row
      std::memset(dz + rows * pitch_of(p.K), 0, pitch_of(p.K) * sizeof(uint16_t));
      std::memset(activation + rows * pitch_of(p.C), 0, pitch_of(p.C) * sizeof(uint16_t));
    }
    pair_gradient(p, dz, rows, paired);
    weight_tile(p, paired, activation, rows, first, end, add, paired + p.pairs_size(), sums.weight, ahead);
  }
  if (p.grad_x) input_tile(p, dz, activation, row, rows, first, end, sums, ahead);
}

}  // namespace resnet_fused::cpu::bf16
#endif
