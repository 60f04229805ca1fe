// A convolution by Winograd's filtering, cut into blocks of tiles and panels of output channels, and the three stages
// of the work: the input of a block transformed, the weight of a panel transformed, and for a block and a panel the
// products, the output's transform, and the sums of batch statistics while the outputs are in cache.
#pragma once

#include <algorithm>
#include <cstdint>

#include "winograd.h"

namespace resnet_fused::cpu {

using F2 = Filtering<2>;

inline constexpr int64_t kAhead = 4;  // tiles, whose lines are on their way

struct Problem {
  const float *x, *weight;
  float* z;
  // x: [N, H, W, C], z: [N, P, Q, K], rows of pixels without gaps; the weight's element (k, c, r, s) is at the strides.
  int64_t N, H, W, C, P, Q, K, padding, stride_k, stride_c, stride_r, stride_s;
  int64_t panel = 0, panels = 0, tile_rows = 0, tile_columns = 0, tiles = 0, blocks = 0;

  static constexpr int64_t kGap = 16;  // rows of whole cache lines, and not a power of two apart

  int64_t v_pitch() const { return (C + 15) / 16 * 16 + kGap; }
  int64_t m_pitch() const { return panel + kGap; }
  int64_t first_tile(int64_t block) const { return tiles * block / blocks; }
  int64_t size(int64_t block) const { return first_tile(block + 1) - first_tile(block); }
  int64_t most_tiles() const { return (tiles + blocks - 1) / blocks; }
  int64_t v_size(int64_t count) const { return F2::values * count * v_pitch(); }
  int64_t m_size() const { return F2::values * most_tiles() * m_pitch(); }
  int64_t u_plane() const { return C * panel + kGap; }
  int64_t u_size() const { return F2::values * u_plane(); }  // of one panel
};

// A tile, by its first output.
struct Tile {
  int64_t sample, row, column;

  RESNET_FUSED_INLINE Tile(const Problem& p, int64_t tile)
      : sample(tile / (p.tile_rows * p.tile_columns)),
        row(tile / p.tile_columns % p.tile_rows * F2::outputs),
        column(tile % p.tile_columns * F2::outputs) {}

  // How many of its outputs there are.
  RESNET_FUSED_INLINE int64_t rows(const Problem& p) const { return std::min(F2::outputs, p.P - row); }
  RESNET_FUSED_INLINE int64_t columns(const Problem& p) const { return std::min(F2::outputs, p.Q - column); }

  // Go on to the next one.
  RESNET_FUSED_INLINE void advance(const Problem& p) {
    column += F2::outputs;
    if (column >= p.Q) column = 0, row += F2::outputs;
    if (row >= p.P) row = 0, ++sample;
  }
};

// Sums of a block's outputs, per channel, for statistics: see block_moments in moments.h. Null: not asked for.
struct Sums {
  float *pivot = nullptr, *sum = nullptr, *square = nullptr;  // of one block
};

// v: [values][tiles of the block][v_pitch]. `zeros`: a pixel of the padding.
template <class L>
RESNET_FUSED_INLINE void transform_inputs(const Problem& p, int64_t block, float* v, const float* zeros) {
  const int64_t first = p.first_tile(block), count = p.size(block), plane = count * p.v_pitch();
  Tile tile(p, first);
  for (int64_t t = 0; t < count; ++t, tile.advance(p)) {
    const int64_t top = tile.row - p.padding, left = tile.column - p.padding;
    const float* pixels[F2::inputs][F2::inputs];
    for (int64_t i = 0; i < F2::inputs; ++i) {
      const int64_t h = top + i;
      const float* line = p.x + ((tile.sample * p.H + h) * p.W + left) * p.C;
      for (int64_t j = 0; j < F2::inputs; ++j) {
        const bool inside = h >= 0 && h < p.H && left + j >= 0 && left + j < p.W;
        pixels[i][j] = inside ? line + j * p.C : zeros;
      }
    }
    transform_input<L, F2>(v + t * p.v_pitch(), plane, pixels, p.C, kAhead * F2::outputs * p.C);
  }
}

// taps[i][tap][k] = the weight's taps for the channels [c, c + channels) and the outputs [k, k + outputs), read in the
// order of memory, and a line that is read later fetched meanwhile: which channels lie far apart, in lines that compete
// for the same places of the cache.
template <int64_t panel>
RESNET_FUSED_INLINE void gather_taps(const Problem& p, int64_t c, int64_t channels, int64_t k, int64_t outputs,
                                     float (*taps)[9][panel]) {
  const float* first = p.weight + k * p.stride_k + c * p.stride_c;
  const auto place = [&](int64_t tap) { return tap / 3 * p.stride_r + tap % 3 * p.stride_s; };
  if (p.stride_c <= p.stride_k) {
    for (int64_t j = 0; j < outputs; ++j) {
      for (int64_t tap = 0; tap < 9; ++tap) {
        const float* from = first + j * p.stride_k + place(tap);
        __builtin_prefetch(from + channels * p.stride_c);
        for (int64_t i = 0; i < channels; ++i) taps[i][tap][j] = from[i * p.stride_c];
      }
    }
    return;
  }
  for (int64_t i = 0; i < channels; ++i) {
    for (int64_t tap = 0; tap < 9; ++tap) {
      const float* from = first + i * p.stride_c + place(tap);
      for (int64_t j = 0; j < outputs; j += 16) __builtin_prefetch(from + 4 * p.stride_c + j * p.stride_k, 0, 2);
      for (int64_t j = 0; j < outputs; ++j) taps[i][tap][j] = from[j * p.stride_k];
    }
  }
}

// u: [values][C][panel], planes u_plane apart, channels [begin, end) of it; zeros beyond the last output channel.
template <class L>
RESNET_FUSED_INLINE void transform_weights(const Problem& p, int64_t panel, int64_t begin, int64_t end, float* u) {
  constexpr int64_t kChannels = 16;  // a cache line of a weight whose channels lie side by side
  const int64_t first = panel * L::panel, outputs = std::min(L::panel, p.K - first);
  float taps[kChannels][9][L::panel] = {};
  for (int64_t c = begin; c < end; c += kChannels) {
    const int64_t channels = std::min(kChannels, end - c);
    gather_taps<L::panel>(p, c, channels, first, outputs, taps);
    for (int64_t i = 0; i < channels; ++i) {
      transform_weight<L, F2>(u + (c + i) * L::panel, p.u_plane(), taps[i][0]);
    }
  }
}

// Write the outputs of a tile; `m` has its values of a panel, whose first outputs * outputs planes get the outputs too.
// bad stays 0 while all outputs are finite.
template <class L>
RESNET_FUSED_INLINE void write_tile(const Problem& p, const Tile& tile, int64_t k, float* m, int64_t plane,
                                    typename L::Vector& bad) {
  const int64_t channels = std::min(L::panel, p.K - k), rows = tile.rows(p), columns = tile.columns(p);
  float* first = p.z + ((tile.sample * p.P + tile.row) * p.Q + tile.column) * p.K + k;
  for (int64_t c = 0; c < channels; c += L::lanes) {
    typename L::Vector y[F2::outputs][F2::outputs];
    transform_output<L, F2>(y, m + c, plane);
#pragma GCC unroll 2
    for (int64_t i = 0; i < F2::outputs; ++i) {
#pragma GCC unroll 2
      for (int64_t j = 0; j < F2::outputs; ++j) {
        bad += y[i][j] * 0.0f;
        float* kept = m + (i * F2::outputs + j) * plane + c;
        store_vector<L>(kept, y[i][j]);
        if (i >= rows || j >= columns) continue;
        float* target = first + (i * p.Q + j) * p.K + c;
        __builtin_prefetch(target + kAhead * F2::outputs * p.K, 1);
        if (channels - c >= L::lanes) {
          store_vector<L>(target, y[i][j]);
        } else {
          for (int64_t lane = 0; lane < channels - c; ++lane) target[lane] = kept[lane];
        }
      }
    }
  }
}

// Sums over the outputs of the tiles [first, first + count) for one vector of channels; m as write_tile
// leaves it. The mean is found first, from differences to the first output, then everything is summed about it.
template <class L>
RESNET_FUSED_INLINE void sum_vector(const Problem& p, int64_t first, int64_t count, const float* m, int64_t plane,
                                    float* pivot, float* sum, float* square) {
  using V = typename L::Vector;
  constexpr int64_t kOutputs = F2::outputs * F2::outputs;
  V about, totals[kOutputs] = {}, squares[kOutputs] = {};
  load_vector<L>(about, m);
  int64_t outputs = 0;
  for (int64_t pass = 0; pass < 2; ++pass) {
    Tile tile(p, first);
    for (int64_t t = 0; t < count; ++t, tile.advance(p)) {
      const int64_t rows = tile.rows(p), columns = tile.columns(p);
      const float* values = m + t * p.m_pitch();
#pragma GCC unroll 4
      for (int64_t i = 0; i < kOutputs; ++i) {
        if (i / F2::outputs >= rows || i % F2::outputs >= columns) continue;
        V value;
        load_vector<L>(value, values + i * plane);
        const V difference = value - about;
        totals[i] += difference;
        squares[i] += difference * difference;
      }
      outputs += rows * columns;
    }
    if (pass == 0) {
      about += ((totals[0] + totals[1]) + (totals[2] + totals[3])) * (1.0f / static_cast<float>(outputs));
      for (int64_t i = 0; i < kOutputs; ++i) totals[i] = squares[i] = V{};
    }
  }
  store_vector<L>(pivot, about);
  store_vector<L>(sum, (totals[0] + totals[1]) + (totals[2] + totals[3]));
  store_vector<L>(square, (squares[0] + squares[1]) + (squares[2] + squares[3]));
}

// The outputs of a block in a panel, from the transformed input and weight; `m` is room for m_size values. Returns
// whether all are finite.
template <class L>
RESNET_FUSED_INLINE bool write_outputs(const Problem& p, int64_t block, int64_t panel, const float* v, const float* u,
                                       float* m, const Sums& sums) {
  const int64_t first = p.first_tile(block), count = p.size(block), k = panel * L::panel;
  const int64_t plane = count * p.m_pitch();
  for (int64_t i = 0; i < F2::values; ++i) {
    multiply_rows<L>(count, v + i * count * p.v_pitch(), p.v_pitch(), u + i * p.u_plane(), p.C, m + i * plane,
                     p.m_pitch());
  }
  typename L::Vector bad = {};
  Tile tile(p, first);
  for (int64_t t = 0; t < count; ++t, tile.advance(p)) write_tile<L>(p, tile, k, m + t * p.m_pitch(), plane, bad);
  if (sums.pivot) {
    for (int64_t c = 0; c < L::panel; c += L::lanes) {
      sum_vector<L>(p, first, count, m + c, plane, sums.pivot + k + c, sums.sum + k + c, sums.square + k + c);
    }
  }
  float lanes[L::lanes];
  store_vector<L>(lanes, bad);
  return std::all_of(lanes, lanes + L::lanes, [](float lane) { return lane == 0; });
}

}  // namespace resnet_fused::cpu
