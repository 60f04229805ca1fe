// A convolution by Winograd's filtering, cut into tiles, blocks of tiles, and panels of output channels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace resnet_fused::cpu {

inline constexpr int64_t kAhead = 4;  // tiles, whose lines are on their way

struct Problem {
  const float *x, *weight;
  float* z;
  // x: [N, H, W, C], z: [N, P, Q, K], rows of pixels without gaps; the weight's element (k, c, r, s) is at the strides.
  int64_t N, H, W, C, P, Q, K, padding, stride_k, stride_c, stride_r, stride_s;
  int64_t outputs;  // of a tile to a side
  int64_t panel = 0, panels = 0, tile_rows = 0, tile_columns = 0, tiles = 0, blocks = 0;
  int64_t u_pitch = 0;  // between rows of the transformed weight, which may hold several panels
  int64_t u_gap = 0;    // behind its planes

  static constexpr int64_t kGap = 16;  // rows of whole cache lines, and not a power of two apart

  int64_t values() const { return (outputs + 2) * (outputs + 2); }
  int64_t v_pitch() const { return (C + 15) / 16 * 16 + kGap; }
  int64_t m_pitch() const { return panel + kGap; }
  int64_t first_tile(int64_t block) const { return tiles * block / blocks; }
  int64_t size(int64_t block) const { return first_tile(block + 1) - first_tile(block); }
  int64_t most_tiles() const { return (tiles + blocks - 1) / blocks; }
  int64_t v_size(int64_t count) const { return values() * count * v_pitch(); }
  int64_t m_size() const { return values() * most_tiles() * m_pitch(); }
  int64_t u_plane() const { return C * u_pitch + u_gap; }
  int64_t u_size() const { return values() * u_plane(); }  // of one row of panels

  // With a size of panels and of tiles.
  void cut(int64_t tile, int64_t panel_width) {
    outputs = tile, panel = panel_width, panels = (K + panel - 1) / panel;
    tile_rows = (P + outputs - 1) / outputs, tile_columns = (Q + outputs - 1) / outputs;
    tiles = N * tile_rows * tile_columns;
  }
};

// A tile of M x M outputs, by its first.
template <int64_t M>
struct Tile {
  int64_t sample, row, column;

  RESNET_FUSED_INLINE Tile(const Problem& p, int64_t tile)
      : sample(tile / (p.tile_rows * p.tile_columns)),
        row(tile / p.tile_columns % p.tile_rows * M),
        column(tile % p.tile_columns * M) {}

  // How many of its outputs there are.
  RESNET_FUSED_INLINE int64_t rows(const Problem& p) const { return std::min(M, p.P - row); }
  RESNET_FUSED_INLINE int64_t columns(const Problem& p) const { return std::min(M, p.Q - column); }

  // Go on to the next one.
  RESNET_FUSED_INLINE void advance(const Problem& p) {
    column += M;
    if (column >= p.Q) column = 0, row += M;
    if (row >= p.P) row = 0, ++sample;
  }
};

}  // namespace resnet_fused::cpu
