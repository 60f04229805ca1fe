// What is transformed before the products of a 3x3 convolution with a stride of 2: the input of a block of tiles.
#pragma once

#include <cstdint>

#include "winograd.h"
#include "winograd_problem.h"

namespace resnet_fused::cpu {

// Where the values of a tile lie: [sum][tile][depth of the sum][C], a gap behind each tile's. C is of whole vectors.
struct StridedPlace {
  int64_t C, count, tile;  // channels, tiles of the block, this one

  RESNET_FUSED_INLINE int64_t operator()(int64_t i, int64_t j) const {
    const int64_t p = Strided::sum(i), q = Strided::sum(j),
                  first = Strided::place(Strided::first(p), Strided::first(q));
    const int64_t before = first * C + (p * Strided::sums + q) * Problem::kGap;
    const int64_t depth = Strided::depth(p) * Strided::depth(q);
    return before * count + tile * (depth * C + Problem::kGap) + (Strided::place(i, j) - first) * C;
  }
};

// The transform of a tile, whose pixels have `channels` values. `ahead`: as transform_input's.
template <class L>
RESNET_FUSED_INLINE void transform_strided(float* v, const StridedPlace& place, const float* const (&pixels)[5][5],
                                           int64_t channels, int64_t ahead) {
  using V = typename L::Vector;
  constexpr int64_t A = Strided::inputs;
  float* to[A][A];
  for (int64_t i = 0; i < A * A; ++i) to[i / A][i % A] = v + place(i / A, i % A);
  for (int64_t c = 0; c < channels; c += L::lanes) {
    V columns[A][A];
#pragma GCC unroll 8
    for (int64_t j = 0; j < A; ++j) {
      V d[A];
#pragma GCC unroll 8
      for (int64_t i = 0; i < A; ++i) {
        load_vector<L>(d[i], pixels[i][j] + c);
        if (j > 0) __builtin_prefetch(pixels[i][j] + c + ahead);
      }
      Strided::input(columns[j], d);
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < A; ++i) {
      V d[A], r[A];
#pragma GCC unroll 8
      for (int64_t j = 0; j < A; ++j) d[j] = columns[j][i];
      Strided::input(r, d);
#pragma GCC unroll 8
      for (int64_t j = 0; j < A; ++j) store_vector<L>(to[i][j] + c, r[j]);
    }
  }
}

// v: as StridedPlace says, of the tiles `tiles` of a block. `zeros`: a pixel of the padding.
template <class L>
RESNET_FUSED_INLINE void transform_strided_inputs(const Problem& p, int64_t block, Problem::Range tiles, float* v,
                                                  const float* zeros) {
  Tile<2> tile(p, p.first_tile(block) + tiles.begin);
  for (int64_t t = tiles.begin; t < tiles.end; ++t, tile.advance(p)) {
    const int64_t top = 2 * tile.row - p.padding, left = 2 * tile.column - p.padding;
    const float* pixels[5][5];
    for (int64_t i = 0; i < 5; ++i) {
      const int64_t h = top + i;
      const float* line = p.x + ((tile.sample * p.H + h) * p.W + left) * p.C;
      for (int64_t j = 0; j < 5; ++j) {
        const bool inside = h >= 0 && h < p.H && left + j >= 0 && left + j < p.W;
        pixels[i][j] = inside ? line + j * p.C : zeros;
      }
    }
    transform_strided<L>(v, {p.C, p.size(block), t}, pixels, p.C, kAhead * 4 * p.C);
  }
}

}  // namespace resnet_fused::cpu
