// Grouped 3x3 convolutions with padding 1: how channels lie in vectors, and which rows a piece of work has.
//
// A slot is a vector of channels. Where several groups fit into one, a slot holds whole groups, and each lane
// multiplies by the value of its own group, picked by a permutation; else a group takes whole slots of its own, the
// last perhaps in part, and values are broadcast. Either way no lane multiplies what is not in its group, and nothing
// is multiplied with padding: NaN and Inf reach what they reach in a direct sum.
#pragma once

#include <algorithm>
#include <cstdint>

#include "product.h"

namespace resnet_fused::cpu {

#ifdef RESNET_FUSED_LEVEL_512
inline constexpr bool kPermutes = true;
#else
inline constexpr bool kPermutes = false;  // Clang's shuffles take constants alone
#endif

// A strip of rows of what is written, of one sample, and a range of slots.
struct Unit {
  int64_t sample, strip, first_row, end_row;
  int64_t first_slot, end_slot;
  int64_t first_read, end_read;  // rows of what is read
};

struct Grouped {
  int64_t N, C, H, W;  // of what is read: a convolution's input, or the gradient of its output
  int64_t P, Q;        // of what is written
  int64_t width;       // channels a group
  int64_t stride;      // of the convolution
  bool transposed;     // whether it is the convolution's input that is written
  int64_t lanes;       // of a vector

  bool shared;                          // whether a slot holds several groups
  int64_t per_group, slots;             // slots a group, where they do not share, and all
  int64_t range_slots, ranges;          // a range holds whole groups
  int64_t strip_rows, strips, in_rows;  // rows of a strip, and the most that are read for it

  int32_t first_lane[16];  // of a lane's group, where groups share a slot

  static constexpr int64_t kRange = 128;                // channels
  static constexpr int64_t kStrip = int64_t(64) << 10;  // packed values: a quarter of a second-level cache of 1 MiB

  // Needs the sizes above, and `lanes`.
  void cut() {
    shared = kPermutes && lanes > 4 && width < lanes && lanes % width == 0 && width % 2 == 0;
    per_group = shared ? 1 : (width + lanes - 1) / lanes;
    slots = shared ? (C + lanes - 1) / lanes : C / width * per_group;
    range_slots = std::min(slots, std::max<int64_t>(kRange / lanes / per_group, 1) * per_group);
    ranges = (slots + range_slots - 1) / range_slots;
    const int64_t rows = std::max<int64_t>(kStrip / (packed_row() * range_slots) - 2, 1);
    const int64_t most = scatters() ? 2 * rows : std::max<int64_t>(rows / stride, 1);
    strips = (P + most - 1) / most;
    strip_rows = (P + strips - 1) / strips;
    strips = (P + strip_rows - 1) / strip_rows;
    for (int64_t i = 0; i < lanes; ++i) first_lane[i] = static_cast<int32_t>(i / width * width);
    in_rows = scatters() ? strip_rows / 2 + 2 : (strip_rows - 1) * stride + 3;
  }

  // Whether each value that is read meets every second of those that are written.
  bool scatters() const { return transposed && stride == 2; }
  // Columns that are made: in pairs, where they are made of different taps.
  int64_t columns() const { return scatters() ? (Q + 1) / 2 * 2 : Q; }
  int64_t first_channel(int64_t slot) const {
    return shared ? slot * lanes : slot / per_group * width + slot % per_group * lanes;
  }
  int64_t channels(int64_t slot) const {
    return std::min(lanes, shared ? C - slot * lanes : width - slot % per_group * lanes);
  }
  int64_t rows_of(int64_t strip) const { return std::min(P - strip * strip_rows, strip_rows); }
  Unit unit(int64_t range, int64_t strip) const {
    Unit u{};
    u.sample = strip / strips, u.strip = strip % strips;
    u.first_slot = range * range_slots, u.end_slot = std::min(slots, u.first_slot + range_slots);
    u.first_row = u.strip * strip_rows, u.end_row = u.first_row + rows_of(u.strip);
    u.first_read = scatters() ? u.first_row / 2 : std::max<int64_t>(u.first_row * stride - 1, 0);
    u.end_read = std::min(H, scatters() ? u.end_row / 2 + 1 : (u.end_row - 1) * stride + 2);
    return u;
  }

  // Of packed rows, with a column beside either edge, that nobody reads a result of.
  int64_t packed_row() const { return (W + 2) * lanes; }
  int64_t packed_slot() const { return in_rows * packed_row(); }
  int64_t packed_size() const { return range_slots * packed_slot(); }
  // The first packed slot of a slot's group, from which on its channels are counted.
  int64_t group_slot(const Unit& unit, int64_t slot) const {
    return (shared ? slot : slot / per_group * per_group) - unit.first_slot;
  }
  // Of packed weights.
  int64_t weight_row() const { return width * 3 * lanes; }
  int64_t weight_slot() const { return 3 * weight_row(); }
};

// to: [slot][lane] of one pixel, slots `pitch` apart. Lanes without a channel are zero.
template <class L>
RESNET_FUSED_INLINE void pack_pixel(const Grouped& g, const Unit& unit, const float* pixel, int64_t pitch, float* to) {
  for (int64_t slot = unit.first_slot; slot < unit.end_slot; ++slot, to += pitch) {
    const float* from = pixel + g.first_channel(slot);
    const int64_t channels = g.channels(slot);
    for (int64_t i = 0; i < L::lanes; ++i) to[i] = i < channels ? from[i] : 0.0f;
  }
}

// dst: [slot][row][column][lane] of an image's rows, whose pixels have C channels, from the second column on.
template <class L>
RESNET_FUSED_INLINE void pack_rows(const Grouped& g, const Unit& unit, const float* image, int64_t rows,
                                   int64_t columns, int64_t packed_slot, float* dst) {
  const bool is_dense = g.C % L::lanes == 0 && (g.shared || g.width % L::lanes == 0);
  constexpr int64_t kAhead = 16;  // pixels, on their way from memory
  const int64_t slots = unit.end_slot - unit.first_slot;
  for (int64_t row = 0; row < rows; ++row, dst += (columns + 2) * L::lanes) {
    float* to = dst + L::lanes;
    if (!is_dense) {
      for (int64_t i = 0; i < columns; ++i) pack_pixel<L>(g, unit, image + i * g.C, packed_slot, to + i * L::lanes);
    } else {
      const float* from = image + unit.first_slot * L::lanes;
      for (int64_t i = 0; i < columns; ++i, from += g.C, to += L::lanes) {
#pragma GCC unroll 4
        for (int64_t slot = 0; slot < slots; ++slot) {
          typename L::Vector v;
          load_vector<L>(v, from + slot * L::lanes);
          store_vector<L>(to + slot * packed_slot, v);
          __builtin_prefetch(from + slot * L::lanes + kAhead * g.C);
        }
      }
    }
    image += columns * g.C;
  }
}

// The rows that a unit reads.
template <class L>
RESNET_FUSED_INLINE void pack_read(const Grouped& g, const Unit& unit, const float* x, float* dst) {
  const float* first = x + (unit.sample * g.H + unit.first_read) * g.W * g.C;
  pack_rows<L>(g, unit, first, unit.end_read - unit.first_read, g.W, g.packed_slot(), dst);
}

// Numbers of lanes; and to every lane the value of the lane that its number names.
template <class L>
using Lanes = decltype(typename L::Vector{} < typename L::Vector{});
#ifdef RESNET_FUSED_LEVEL_512
template <class L>
RESNET_FUSED_INLINE void pick(typename L::Vector& to, const typename L::Vector& from, const Lanes<L>& lanes) {
  to = __builtin_shuffle(from, lanes);
}
#endif

// The first lane of every lane's group, and `j` more.
template <class L>
RESNET_FUSED_INLINE void lanes_of_groups(const Grouped& g, int64_t j, Lanes<L>& lanes) {
  __builtin_memcpy(&lanes, g.first_lane, sizeof lanes);
  lanes += static_cast<int32_t>(j);
}

}  // namespace resnet_fused::cpu
