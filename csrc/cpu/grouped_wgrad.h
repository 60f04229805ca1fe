// The inner loops of the weight's gradient of a grouped 3x3 convolution: sums of one slot, one row of taps and a few
// channels of the group, in registers.
#pragma once

#include "grouped.h"

namespace resnet_fused::cpu {

// Channels of a group at a time, each with three sums: enough in flight to hide the latency of FMA.
template <class L>
constexpr int64_t kWgradInputs = L::lanes == 16 ? 4 : 2;

// Values of a column at one time, for the channels at work: picked for every lane's group, or the same for all.
template <class L, bool shared>
struct Inputs {
  static constexpr int64_t J = kWgradInputs<L>;
  Lanes<L> lanes[J];
  typename L::Vector sums[J][3] = {};

  // sums[j][s] += value j of the column `x` * grads[s], for the taps s of a row whose bit is set in `taps`.
  template <int taps>
  RESNET_FUSED_INLINE void add(const float* x, const typename L::Vector (&grads)[3]) {
    typename L::Vector values;
    if constexpr (shared) load_vector<L>(values, x);
#pragma GCC unroll 4
    for (int64_t j = 0; j < J; ++j) {
      typename L::Vector value;
      if constexpr (shared) {
        pick<L>(value, values, lanes[j]);
      } else {
        value = x[j] - typename L::Vector{};
      }
#pragma GCC unroll 3
      for (int64_t s = 0; s < 3; ++s) {
        if (taps >> s & 1) sums[j][s] += value * grads[s];
      }
    }
  }
};

// A row of x and the row of grad that meets it. x: the row's first column; grad: likewise.
template <class L, bool strided, bool shared>
RESNET_FUSED_INLINE void add_row(const Grouped& g, const float* x, const float* grad, Inputs<L, shared>& at) {
  constexpr int64_t N = L::lanes;
  typename L::Vector grads[3] = {};
  if constexpr (strided) {  // an even column meets the tap 1, an odd one 2 and, of the next output, 0
    for (int64_t q = 0; q < g.Q - 1; ++q, x += 2 * N, grad += N) {
      load_vector<L>(grads[0], grad + N);
      load_vector<L>(grads[1], grad);
      grads[2] = grads[1];
      at.template add<0b010>(x, grads);
      at.template add<0b101>(x + N, grads);
    }
    load_vector<L>(grads[1], grad);
    grads[2] = grads[1];
    at.template add<0b010>(x, grads);
    if (g.W % 2 == 0) at.template add<0b100>(x + N, grads);
  } else if (g.Q == 1) {
    load_vector<L>(grads[1], grad);
    at.template add<0b010>(x, grads);
  } else {
    load_vector<L>(grads[0], grad + N);
    load_vector<L>(grads[1], grad);
    at.template add<0b011>(x, grads);
    for (int64_t w = 1; w < g.W - 1; ++w) {
      x += N, grad += N;
      load_vector<L>(grads[0], grad + N);
      load_vector<L>(grads[1], grad);
      load_vector<L>(grads[2], grad - N);
      at.template add<0b111>(x, grads);
    }
    load_vector<L>(grads[1], grad + N);
    load_vector<L>(grads[2], grad);
    at.template add<0b110>(x + N, grads);
  }
}

// dst [row of taps][channel of the group][tap][lane] += the part of the rows [first, end), whose sums are in registers.
// x: packed, from the slot's group on; grad: packed, the slot's. The group's channels are filled up to a multiple of
// those at work, with what nobody reads.
template <class L, bool strided, bool shared>
RESNET_FUSED_INLINE void add_rows(const Grouped& g, const Unit& unit, int64_t first, int64_t end, int64_t depth,
                                  const float* x, const float* grad, float* dst) {
  constexpr int64_t J = kWgradInputs<L>;
  for (int64_t r = 0; r < 3; ++r) {
    for (int64_t j0 = 0; j0 < depth; j0 += J) {
      Inputs<L, shared> at;
      if constexpr (shared) {
#pragma GCC unroll 4
        for (int64_t j = 0; j < J; ++j) lanes_of_groups<L>(g, j0 + j, at.lanes[j]);
      }
      const float* column = x + L::lanes;
      if constexpr (!shared) column += j0 / L::lanes * g.packed_slot() + j0 % L::lanes;
      for (int64_t row = first; row < end; ++row) {
        const int64_t from = row * g.stride - 1 + r;
        if (from < 0 || from >= g.H) continue;
        add_row<L, strided, shared>(g, column + (from - unit.first_read) * g.packed_row(),
                                    grad + ((row - unit.first_row) * (g.Q + 2) + 1) * L::lanes, at);
      }
#pragma GCC unroll 4
      for (int64_t j = 0; j < J; ++j) {
#pragma GCC unroll 3
        for (int64_t s = 0; s < 3; ++s, dst += L::lanes) {
          typename L::Vector before;
          load_vector<L>(before, dst);
          store_vector<L>(dst, before + at.sums[j][s]);
        }
      }
    }
  }
}

// The same of a strip, by so many pixels at a time that no sum is longer than oneDNN's are: rounding grows with it.
template <class L, bool strided, bool shared>
RESNET_FUSED_INLINE void add_strip(const Grouped& g, const Unit& unit, int64_t depth, const float* x, const float* grad,
                                   float* dst) {
  constexpr int64_t kPixels = 32;
  const int64_t rows = std::max<int64_t>(kPixels / g.Q, 1);
  for (int64_t row = unit.first_row; row < unit.end_row; row += rows) {
    add_rows<L, strided, shared>(g, unit, row, std::min(unit.end_row, row + rows), depth, x, grad, dst);
  }
}

}  // namespace resnet_fused::cpu
