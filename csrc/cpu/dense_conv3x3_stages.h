// The second convolution of a dense layer, a strip at a time.
#pragma once

#include "dense_strips.h"
#include "product.h"
#include "winograd_problem.h"
#include "winograd_stages.h"

namespace resnet_fused::cpu {

struct DenseConv {
  Activation input;  // [pixels, K]
  Problem weight;    // of which only the weight is read: from its C = K channels to its K = G outputs
  const float* u;    // [panels], each as transform_weights makes it
  Strips strips;
  float* out;  // [pixels], out_pitch apart
  int64_t out_pitch;

  int64_t pitch() const { return pitch_of(input.C); }
  int64_t m_pitch() const { return weight.panel + kGap; }
  int64_t y_pitch() const { return weight.panels * weight.panel; }
  int64_t v_size() const { return Tile2::values * Strips::kTiles * pitch(); }
  int64_t m_size() const { return Tile2::values * Strips::kTiles * m_pitch(); }
  int64_t scratch() const { return strips.pixels() * pitch() + v_size() + m_size(); }
};

// The outputs of a group of tiles for one panel, from the products m[value][tile][m_pitch]. bad stays 0 while all
// are finite.
template <class L>
RESNET_FUSED_INLINE void write_tiles(const DenseConv& p, const Strip& s, int64_t first, int64_t count, int64_t panel,
                                     const float* m, float* y, typename L::Vector& bad) {
  const int64_t pitch = p.y_pitch(), plane = count * p.m_pitch();
  StripTile tile(p.strips, s, first);
  for (int64_t t = 0; t < count; ++t, tile.advance(p.strips, s), m += p.m_pitch()) {
    float* to = y + tile.output(p.strips, s) * pitch + panel * L::panel;
    const bool below = tile.row + 1 < s.rows, right = tile.column + 1 < p.strips.W;
    for (int64_t c = 0; c < L::panel; c += L::lanes) {
      typename L::Vector found[2][2];
      transform_output<L, Tile2>(found, m + c, plane);
      bad += (found[0][0] + found[0][1] + (found[1][0] + found[1][1])) * 0.0f;
      store_vector<L>(to + c, found[0][0]);
      if (right) store_vector<L>(to + pitch + c, found[0][1]);
      if (below) store_vector<L>(to + p.strips.W * pitch + c, found[1][0]);
      if (below && right) store_vector<L>(to + (p.strips.W + 1) * pitch + c, found[1][1]);
    }
  }
}

// y[output of the strip][y_pitch] = the convolution; whether all are finite.
template <class L>
RESNET_FUSED_INLINE bool convolve_strip(const DenseConv& p, int64_t index, float* scratch, float* y) {
  const Strip s = p.strips.at(index);
  const int64_t pitch = p.pitch(), K = p.input.C, groups = p.strips.groups(s);
  float *strip = scratch, *v = strip + p.strips.pixels() * pitch, *m = v + p.v_size();
  write_strip(p.strips, s, strip, pitch, [&](float* out, int64_t pixel, int64_t count) __attribute__((always_inline)) {
    write_activation<L>(p.input, pixel, count, 0, K, out, pitch);
  });
  typename L::Vector bad = {};
  const int64_t times = p.strips.products<L>(s) * p.weight.panels;
  Ahead next(p.strips.lines(index + 1, p.strips.count, p.input.x, K, K), times);
  Ahead written({p.out + p.strips.first_pixel(s) * p.out_pitch, p.strips.pixels_of(s), p.weight.K, p.out_pitch}, times);
  const auto between = [&] __attribute__((always_inline)) { next(), written.fetch<1>(); };
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = s.tiles * group / groups, count = s.tiles * (group + 1) / groups - first;
    transform_strip<L>(p.strips, s, first, count, strip, pitch, rounded_up(K, L::lanes), v);
    for (int64_t panel = 0; panel < p.weight.panels; ++panel) {
      const float* u = p.u + panel * p.weight.u_size();
      for (int64_t i = 0; i < Tile2::values; ++i) {
        multiply_rows<L>(count, v + i * count * pitch, pitch, u + i * p.weight.u_plane(), K,
                         m + i * count * p.m_pitch(), p.m_pitch(), between);
      }
      write_tiles<L>(p, s, first, count, panel, m, y, bad);
    }
  }
  float lanes[L::lanes];
  store_vector<L>(lanes, bad);
  return std::all_of(lanes, lanes + L::lanes, [](float lane) { return lane == 0; });
}

}  // namespace resnet_fused::cpu
