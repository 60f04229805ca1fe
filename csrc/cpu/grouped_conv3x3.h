// The inner loops of a grouped 3x3 convolution: a block of outputs of one row and one slot, in registers.
#pragma once

#include <array>

#include "grouped.h"

namespace resnet_fused::cpu {

// Which columns an output is a sum of: three neighbours, those around every second column, or, of a strided
// convolution's gradient, one or two.
enum class Walk { kPlain, kStrided, kScattered };

// The output of a block to which the block's column `i` goes with the tap `s`; not one of the block's perhaps.
template <Walk walk>
constexpr int64_t output_of(int64_t i, int64_t s) {
  if (walk == Walk::kPlain) return i - s;
  if (walk == Walk::kStrided) return (i - s) % 2 ? -1 : (i - s) / 2;
  return 2 * i - 1 + s;
}

template <Walk walk>
constexpr int64_t columns_of(int64_t outputs) {
  return walk == Walk::kPlain ? outputs + 2 : walk == Walk::kStrided ? 2 * outputs + 1 : outputs / 2 + 1;
}

// What a block reads: up to three rows, from the block's first column on, and their taps [channel][column][lane].
struct Taps {
  const float* rows[3];
  const float* weights[3];
  int64_t count;
  bool left, right;  // whether the first column, or the last, is padding
};

// Channels of a group at a time: a vector of values is read once for two, where the registers hold their weights. Of a
// strided walk the compiler then keeps permuted values as well, and has no room for sums.
template <class L, Walk walk, bool shared>
constexpr int64_t kInputs = shared && L::lanes == 16 && walk != Walk::kStrided ? 2 : 1;

// dst: [row of taps][channel of the group][tap][lane], for the outputs of one slot.
inline void pack_weight(const Grouped& g, const float* weight, const std::array<int64_t, 4>& strides, int64_t slot,
                        float* dst) {
  const int64_t first = g.first_channel(slot), channels = g.channels(slot);
  const bool flips = g.transposed && !g.scatters();  // a gradient of stride 1 is a convolution with exchanged taps
  int64_t from[16] = {};                             // of a lane; those without a channel repeat what nobody reads
  for (int64_t lane = 0; lane < channels; ++lane) {
    const int64_t c = first + lane, of_group = c % g.width;
    from[lane] = g.transposed ? (c - of_group) * strides[0] + of_group * strides[1] : c * strides[0];
  }
  const int64_t step = strides[g.transposed ? 0 : 1];
  for (int64_t r = 0; r < 3; ++r) {
    const float* row = weight + (flips ? 2 - r : r) * strides[2];
    for (int64_t j = 0; j < g.width; ++j, row += step) {
      for (int64_t s = 0; s < 3; ++s, dst += g.lanes) {
        const float* tap = row + (flips ? 2 - s : s) * strides[3];
        for (int64_t lane = 0; lane < g.lanes; ++lane) dst[lane] = tap[from[lane]];
      }
    }
  }
}

// sums: [Q][lane], of a block of Q outputs.
template <class L, Walk walk, int64_t Q, bool shared>
RESNET_FUSED_INLINE void convolve_block(const Grouped& g, const Taps& taps, float* sums) {
  using Vector = typename L::Vector;
  constexpr int64_t kColumns = columns_of<walk>(Q), kAtOnce = kInputs<L, walk, shared>;
  Vector at[Q] = {};
  const int64_t depth = g.width, packed_slot = g.packed_slot();
  for (int64_t row = 0; row < taps.count; ++row) {
    const float* w = taps.weights[row];
    Lanes<L> index[kAtOnce] = {};
    if constexpr (shared) {
#pragma GCC unroll 2
      for (int64_t a = 0; a < kAtOnce; ++a) lanes_of_groups<L>(g, a, index[a]);
    }
    for (int64_t j = 0; j < depth; j += kAtOnce, w += kAtOnce * 3 * L::lanes) {
      Vector weights[kAtOnce][3];
#pragma GCC unroll 2
      for (int64_t a = 0; a < kAtOnce; ++a) {
#pragma GCC unroll 3
        for (int64_t s = 0; s < 3; ++s) load_vector<L>(weights[a][s], w + (a * 3 + s) * L::lanes);
      }
      const float* from = taps.rows[row];
      if constexpr (!shared) from += j / L::lanes * packed_slot + j % L::lanes;
#pragma GCC unroll 32
      for (int64_t i = 0; i < kColumns; ++i) {
        if (walk != Walk::kScattered && i == 0 && taps.left) continue;
        if (i == kColumns - 1 && taps.right) continue;
        Vector values;
        if constexpr (shared) load_vector<L>(values, from + i * L::lanes);
#pragma GCC unroll 2
        for (int64_t a = 0; a < kAtOnce; ++a) {
          Vector value;
          if constexpr (shared) {
            pick<L>(value, values, index[a]);
          } else {
            value = from[i * L::lanes] - Vector{};
          }
#pragma GCC unroll 3
          for (int64_t s = 0; s < 3; ++s) {
            const int64_t q = output_of<walk>(i, s);
            if (q >= 0 && q < Q) at[q] += value * weights[a][s];
          }
        }
      }
      if constexpr (shared) {
#pragma GCC unroll 2
        for (int64_t a = 0; a < kAtOnce; ++a) index[a] += static_cast<int32_t>(kAtOnce);
      }
    }
  }
#pragma GCC unroll 16
  for (int64_t q = 0; q < Q; ++q) store_vector<L>(sums + q * L::lanes, at[q]);
}

// Sums about a pivot of what a unit of work wrote, [lane].
struct SlotSums {
  float *pivot, *sum, *square;
};

// Writes the outputs [from, to) of a block to z, whose pixels have C channels, and takes their moments; `first`: the
// pivot is still to be chosen.
template <class L>
RESNET_FUSED_INLINE void write_block(const float* sums, int64_t from, int64_t to, int64_t channels, int64_t C,
                                     bool first, const SlotSums& moments, float* z) {
  using Vector = typename L::Vector;
  Vector sum = {}, square = {}, pivot = {};
  if (moments.sum) {
    if (first) {
      for (int64_t i = 0; i < L::lanes; ++i) {
        const float value = sums[(from + to) / 2 * L::lanes + i];
        moments.pivot[i] = value - value == 0 ? value : 0;  // inf and NaN must not spread to other units
      }
    }
    load_vector<L>(pivot, moments.pivot);
  }
  for (int64_t q = from; q < to; ++q, z += C) {
    Vector v;
    load_vector<L>(v, sums + q * L::lanes);
    if (channels == L::lanes) {
      store_vector<L>(z, v);
    } else {
      std::copy_n(sums + q * L::lanes, channels, z);
    }
    v -= pivot;
    sum += v;
    square += v * v;
  }
  if (moments.sum) {
    Vector before;
    load_vector<L>(before, moments.sum);
    store_vector<L>(moments.sum, before + sum);
    load_vector<L>(before, moments.square);
    store_vector<L>(moments.square, before + square);
  }
}

// The outputs of a unit in one slot. `packed`: its rows, from the first slot of the slot's group on.
template <class L, Walk walk, int64_t Q, bool shared>
RESNET_FUSED_INLINE void convolve_strip(const Grouped& g, const Unit& unit, int64_t slot, const float* packed,
                                        const float* weight, const SlotSums& sums, float* z) {
  alignas(64) float block[Q * L::lanes];
  const int64_t channel = g.first_channel(slot), channels = g.channels(slot), total = g.columns();
  bool first = true;
  for (int64_t row = unit.first_row; row < unit.end_row; ++row) {
    for (int64_t done = 0; done < total;) {
      const int64_t begin = std::min(done, total - Q);  // some of the last block are made twice
      const int64_t column = walk == Walk::kPlain ? begin - 1 : walk == Walk::kStrided ? 2 * begin - 1 : begin / 2;
      Taps taps{};
      for (int64_t r = 0; r < 3; ++r) {
        int64_t from = row * g.stride - 1 + r;
        if (walk == Walk::kScattered) from = (row + 1 - r) % 2 ? -1 : (row + 1 - r) / 2;
        if (from < 0 || from >= g.H) continue;
        taps.rows[taps.count] = packed + (from - unit.first_read) * g.packed_row() + (column + 1) * L::lanes;
        taps.weights[taps.count++] = weight + r * g.weight_row();
      }
      taps.left = begin == 0;
      taps.right = column + columns_of<walk>(Q) > g.W;
      float* to = z + ((unit.sample * g.P + row) * g.Q + done) * g.C + channel;
      const int64_t end = std::min(g.Q - begin, Q);
      for (int64_t q = 0; q < begin + end - done; ++q)
        __builtin_prefetch(to + q * g.C, 1);  // apart, so no one else does
      convolve_block<L, walk, Q, shared>(g, taps, block);
      write_block<L>(block, done - begin, end, channels, g.C, first, sums, to);
      first = false, done = begin + Q;
    }
  }
}

}  // namespace resnet_fused::cpu
