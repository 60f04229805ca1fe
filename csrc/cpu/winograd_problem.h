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
  int64_t outputs;     // of a tile to a side
  int64_t stride = 1;  // of the convolution, or 2 with tiles of 2 x 2 outputs
  int64_t panel = 0, panels = 0, tile_rows = 0, tile_columns = 0, tiles = 0, blocks = 0;
  int64_t odd_rows = 0, odd_columns = 0;  // of tiles with one output, where a tile has two: 0 or 1, the last
  int64_t m_columns = 0;                  // of sums that are kept at a time: those of a panel, or of all
  int64_t u_pitch = 0;                    // between rows of the transformed weight, which may hold several panels
  int64_t u_gap = 0;                      // behind its planes

  static constexpr int64_t kGap = 16;  // rows of whole cache lines, and not a power of two apart

  // Of a tile: what its pixels become, and the sums over channels that become its outputs.
  int64_t values() const { return stride == 2 ? 25 : (outputs + 2) * (outputs + 2); }
  int64_t sums() const { return stride == 2 ? 9 : values(); }
  int64_t v_pitch() const { return (C + 15) / 16 * 16 + kGap; }
  int64_t m_pitch() const { return m_columns % 32 ? m_columns : m_columns + kGap; }
  // Of one sum for so many tiles: an odd number of cache lines, so that no two sums of a tile compete for a place.
  int64_t m_plane(int64_t count) const { return (count * m_pitch() + 15) / 32 * 32 + 16; }
  int64_t first_tile(int64_t block) const { return tiles * block / blocks; }
  int64_t size(int64_t block) const { return first_tile(block + 1) - first_tile(block); }
  int64_t most_tiles() const { return (tiles + blocks - 1) / blocks; }
  int64_t v_size(int64_t count) const { return count * (stride == 2 ? 25 * C + 9 * kGap : values() * v_pitch()); }
  int64_t m_size() const { return sums() * m_plane(most_tiles()); }
  int64_t u_plane() const { return C * u_pitch + u_gap; }
  int64_t u_size() const { return values() * u_plane(); }  // of one row of panels

  // With a size of panels and of tiles.
  void cut(int64_t tile, int64_t panel_width) {
    outputs = tile, panel = m_columns = panel_width, panels = (K + panel - 1) / panel;
    tile_rows = (P + outputs - 1) / outputs, tile_columns = (Q + outputs - 1) / outputs;
    tiles = N * tile_rows * tile_columns;
    odd_rows = outputs == 2 ? P % 2 : 0, odd_columns = outputs == 2 ? Q % 2 : 0;
  }

  // Tiles are numbered part by part: those of a last row with one output, all others, those of a last column with one,
  // those of both. What makes a second row of outputs, a second column or both is then wanted of a range.
  struct Part {
    int64_t top, bottom, left, right;  // in tiles
  };
  Part part(int64_t i) const {
    const int64_t row = tile_rows - odd_rows, column = tile_columns - odd_columns;
    return {i % 3 ? 0 : row, i % 3 ? row : tile_rows, i < 2 ? 0 : column, i < 2 ? column : tile_columns};
  }
  int64_t size_of(const Part& of) const { return N * (of.bottom - of.top) * (of.right - of.left); }

  struct Range {
    int64_t begin, end;  // counted from the block's first tile
  };
  // The tiles of a block that have a second row, and a second column, of outputs.
  Range with(bool second_row, bool second_column, int64_t block) const {
    const int64_t whole = size_of(part(0)), right = whole + size_of(part(1)), corner = right + size_of(part(2));
    const int64_t first = first_tile(block), count = size(block);
    const int64_t begin = second_row ? whole : 0, end = second_column ? right : second_row ? corner : tiles;
    return {std::clamp<int64_t>(begin - first, 0, count), std::clamp<int64_t>(end - first, 0, count)};
  }
};

// A tile of M x M outputs, by its first.
template <int64_t M>
struct Tile {
  int64_t sample, row, column, place;
  Problem::Part part;

  RESNET_FUSED_INLINE Tile(const Problem& p, int64_t tile) : place(0), part(p.part(0)) {
    while (tile >= p.size_of(part) && place < 3) tile -= p.size_of(part), part = p.part(++place);
    const int64_t columns = std::max<int64_t>(1, part.right - part.left);
    const int64_t rows = std::max<int64_t>(1, part.bottom - part.top);
    sample = tile / (rows * columns);
    row = (part.top + tile / columns % rows) * M, column = (part.left + tile % columns) * M;
  }

  // How many of its outputs there are.
  RESNET_FUSED_INLINE int64_t rows(const Problem& p) const { return std::min(M, p.P - row); }
  RESNET_FUSED_INLINE int64_t columns(const Problem& p) const { return std::min(M, p.Q - column); }

  // Go on to the next one.
  RESNET_FUSED_INLINE void advance(const Problem& p) {
    column += M;
    if (column >= part.right * M) column = part.left * M, row += M;
    if (row >= part.bottom * M) row = part.top * M, ++sample;
    while (sample == p.N && place < 3) {
      part = p.part(++place);
      if (p.size_of(part)) sample = 0, row = part.top * M, column = part.left * M;
    }
  }
};

}  // namespace resnet_fused::cpu
