// Both gradients of a dense layer's second convolution from one strip of its input's values and one of its output's
// gradient.
#pragma once

#include "dense_strips.h"
#include "product.h"
#include "winograd_problem.h"
#include "winograd_stages.h"
#include "winograd_tiles.h"

namespace resnet_fused::cpu {

// grad + (b*y + d) at a slice of the block's buffer.
struct SliceGradient {
  const float *grad, *y, *b, *d;
  int64_t G, grad_pitch, y_pitch;
};

struct DenseConvBackward {
  Activation input;  // [pixels, K]
  const float* mean;
  SliceGradient gradient;
  Problem weight;  // transposed: from its C = G channels to its K outputs
  const float* u;  // [panels], each as transform_weights makes it
  float* g;        // [pixels, K]
  Strips strips;

  int64_t K() const { return input.C; }
  int64_t pitch() const { return pitch_of(K()); }
  int64_t dy_pitch() const { return pitch_of(gradient.G); }
  int64_t m_pitch() const { return weight.panel + kGap; }
  int64_t size(int64_t pitch) const { return Tile2::values * Strips::kTiles * pitch; }  // of a group's values
  int64_t scratch() const {
    return strips.pixels() * (pitch() + dy_pitch()) + std::max(size(pitch()), size(dy_pitch() + m_pitch())) +
           size(dy_pitch()) + 2 * rounded_up(K(), Level512::panel);
  }
  int64_t weight_size() const { return Tile2::values * weight.panels * gradient.G * weight.panel; }
};

// Where a thread's values are, for the panels [first, end) of input channels, from channel c on.
struct BackwardRoom {
  int64_t first, end, c, width, pitch;
  float *strip, *dy, *v, *dy_v, *m, *y, *sums;

  RESNET_FUSED_INLINE BackwardRoom(const DenseConvBackward& p, int64_t first, int64_t end, float* scratch)
      : first(first),
        end(end),
        c(first * p.weight.panel),
        width(std::min(p.K(), end * p.weight.panel) - c),
        pitch(pitch_of(width)),
        strip(scratch),
        dy(strip + p.strips.pixels() * p.pitch()),
        v(dy + p.strips.pixels() * p.dy_pitch()),
        dy_v(v),
        m(dy_v + p.size(p.dy_pitch())),
        y(v + std::max(p.size(p.pitch()), p.size(p.dy_pitch() + p.m_pitch()))),
        sums(y + p.size(p.dy_pitch())) {}
};

// Where b is 0, of norms that are frozen or do not read the channel, no NaN or infinity in y reaches the gradient.
template <class V>
RESNET_FUSED_INLINE void slice_lanes(float* out, const float* grad, const float* y, const float* b, const float* d) {
  V value, other, factor, term;
  load_lanes(value, grad), load_lanes(other, y), load_lanes(factor, b), load_lanes(term, d);
  store_lanes(out, V(value + ((factor == 0 ? V{} : V(factor * other)) + term)));
}

// `count` pixels of dy from `pixel` on; zeros up to whole panels.
template <class L>
RESNET_FUSED_INLINE void write_slice(const SliceGradient& p, int64_t pixel, int64_t count, float* out, int64_t pitch) {
  const int64_t vectors = p.G / L::lanes * L::lanes, padded = rounded_up(p.G, L::panel);
  for (int64_t i = pixel; i < pixel + count; ++i, out += pitch) {
    const float *grad = p.grad + i * p.grad_pitch, *y = p.y + i * p.y_pitch;
    for (int64_t c = 0; c < vectors; c += L::lanes) {
      slice_lanes<typename L::Vector>(out + c, grad + c, y + c, p.b + c, p.d + c);
    }
    for (int64_t c = vectors; c < p.G; ++c) slice_lanes<float>(out + c, grad + c, y + c, p.b + c, p.d + c);
    for (int64_t c = p.G; c < padded; ++c) out[c] = 0;
  }
}

// One vector of channels of g's outputs of a tile: masked, written and summed.
template <class L>
struct GradientTile {
  const DenseConvBackward& p;
  const BackwardRoom& room;
  const float* values;  // of the tile's first output in the strip, its channel room.c
  int64_t pixel;        // of all images
  bool below, right;

  // `c`: from room.c on. bad stays 0 while all are finite before the mask.
  RESNET_FUSED_INLINE void write(int64_t c, const float* m, int64_t plane, typename L::Vector& bad) const {
    using V = typename L::Vector;
    const int64_t W = p.strips.W, line = p.strips.width() * room.pitch, k = room.c + c, count = p.K() - k;
    V found[2][2], total, product, mean;
    transform_output<L, Tile2>(found, m, plane);
    bad += (found[0][0] + found[0][1] + (found[1][0] + found[1][1])) * 0.0f;
    load_vector<L>(total, room.sums + c), load_vector<L>(product, room.sums + rounded_up(room.width, L::panel) + c);
    winograd_wgrad::load_some(mean, p.mean + k, count);
    const V zero = {};
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; ++i) {
      if ((i / 2 && !below) || (i % 2 && !right)) continue;
      V value, z;
      load_vector<L>(value, values + i / 2 * line + i % 2 * room.pitch + c);
      value = value <= zero ? zero : found[i / 2][i % 2];
      const int64_t at = (pixel + i / 2 * W + i % 2) * p.K() + k;
      winograd_wgrad::load_some(z, p.input.x + at, count);
      winograd_wgrad::store_some(p.g + at, value, count);
      total += value, product += value * (z - mean);
    }
    store_vector<L>(room.sums + c, total), store_vector<L>(room.sums + rounded_up(room.width, L::panel) + c, product);
  }
};

// Lines of g that a tile's outputs will be written to, and of z, which they are summed with; a tile at a time.
struct OutputLines {
  const DenseConvBackward& p;
  const Strip& s;
  StripTile tile;
  int64_t left, k, columns;

  RESNET_FUSED_INLINE void operator()() {
    if (left-- <= 0) return;
    const int64_t pixel = p.strips.first_pixel(s) + tile.output(p.strips, s), W = p.strips.W;
    for (int64_t i = 0; i < 4; ++i) {
      if ((i / 2 && tile.row + 1 >= s.rows) || (i % 2 && tile.column + 1 >= W)) continue;
      const int64_t at = (pixel + i / 2 * W + i % 2) * p.K() + k;
      for (int64_t j = 0; j < columns; j += 16) {
        __builtin_prefetch(p.g + at + j, 1, 2);
        __builtin_prefetch(p.input.x + at + j, 0, 2);
      }
    }
    tile.advance(p.strips, s);
  }
};

// Lines of the strip after: of z and of both slices.
struct NextStrip {
  Ahead z, grad, y;

  RESNET_FUSED_INLINE NextStrip(const DenseConvBackward& p, const BackwardRoom& room, int64_t index, int64_t end,
                                int64_t times)
      : z(p.strips.lines(index, end, p.input.x + room.c, room.width, p.K()), times),
        grad(p.strips.lines(index, end, p.gradient.grad, p.gradient.G, p.gradient.grad_pitch), times),
        y(p.strips.lines(index, end, p.gradient.y, p.gradient.G, p.gradient.y_pitch), times) {}

  RESNET_FUSED_INLINE void operator()() { z(), grad(), y(); }
};

// g of a group of tiles, and its sums added to sum_g and sum_gz.
template <class L>
RESNET_FUSED_INLINE void input_gradient(const DenseConvBackward& p, const BackwardRoom& room, const Strip& s,
                                        int64_t first, int64_t count, double* sum_g, double* sum_gz,
                                        typename L::Vector& bad) {
  const int64_t dy_pitch = p.dy_pitch(), m_pitch = p.m_pitch(), padded = rounded_up(room.width, L::panel);
  transform_strip<L>(p.strips, s, first, count, room.dy, dy_pitch, rounded_up(p.gradient.G, L::lanes), room.dy_v);
  std::fill_n(room.sums, 2 * padded, 0.0f);
  for (int64_t panel = room.first; panel < room.end; ++panel) {
    const int64_t c = (panel - room.first) * L::panel, columns = std::min(L::panel, room.width - c);
    OutputLines lines{p, s, StripTile(p.strips, s, first), count, room.c + c, columns};
    for (int64_t i = 0; i < Tile2::values; ++i) {
      multiply_rows<L>(count, room.dy_v + i * count * dy_pitch, dy_pitch,
                       p.u + panel * p.weight.u_size() + i * p.weight.u_plane(), p.gradient.G,
                       room.m + i * count * m_pitch, m_pitch, lines);
    }
    StripTile tile(p.strips, s, first);
    for (int64_t t = 0; t < count; ++t, tile.advance(p.strips, s)) {
      const int64_t patch = tile.patch(p.strips) + p.strips.width() + 1;
      const GradientTile<L> at{p,
                               room,
                               room.strip + patch * room.pitch,
                               p.strips.first_pixel(s) + tile.output(p.strips, s),
                               tile.row + 1 < s.rows,
                               tile.column + 1 < p.strips.W};
      for (int64_t j = 0; j < columns; j += L::lanes) {
        at.write(c + j, room.m + t * m_pitch + j, count * m_pitch, bad);
      }
    }
  }
  for (int64_t c = 0; c < room.width; ++c)
    sum_g[room.c + c] += room.sums[c], sum_gz[room.c + c] += room.sums[padded + c];
}

// y[value][tile][pitch] = the transforms of the 2x2 gradients of `count` tiles; `channels` is of whole vectors.
template <class L>
RESNET_FUSED_INLINE void transform_gradient(const Strips& p, const Strip& s, int64_t first, int64_t count,
                                            const float* strip, int64_t pitch, int64_t channels, float* y) {
  using V = typename L::Vector;
  using Transform = winograd_wgrad::OfGrad;
  const int64_t line = p.width() * pitch, plane = count * pitch;
  StripTile tile(p, s, first);
  for (int64_t t = 0; t < count; ++t, tile.advance(p, s)) {
    const float* from = strip + tile.patch(p) * pitch + line + pitch;
    for (int64_t c = 0; c < channels; c += L::lanes) {
      V columns[2][4];
#pragma GCC unroll 2
      for (int64_t j = 0; j < 2; ++j) {
        V d[2];
        load_vector<L>(d[0], from + j * pitch + c), load_vector<L>(d[1], from + line + j * pitch + c);
        Transform::apply(d, columns[j]);
      }
#pragma GCC unroll 4
      for (int64_t i = 0; i < 4; ++i) {
        const V d[2] = {columns[0][i], columns[1][i]};
        V r[4];
        Transform::apply(d, r);
#pragma GCC unroll 4
        for (int64_t j = 0; j < 4; ++j) store_vector<L>(y + (i * 4 + j) * plane + t * pitch + c, r[j]);
      }
    }
  }
}

// The sums of the weight's gradient over a group of tiles, [value][panel][G][panel], to those that are there with
// `add`.
template <class L>
RESNET_FUSED_INLINE void weight_gradient(const DenseConvBackward& p, const BackwardRoom& room, const Strip& s,
                                         int64_t first, int64_t count, bool add, float* weight, NextStrip& next) {
  const int64_t dy_pitch = p.dy_pitch(), G = p.gradient.G;
  transform_gradient<L>(p.strips, s, first, count, room.dy, dy_pitch, rounded_up(G, L::lanes), room.y);
  transform_strip<L>(p.strips, s, first, count, room.strip, room.pitch, rounded_up(room.width, L::panel), room.v);
  for (int64_t i = 0; i < Tile2::values; ++i) {
    for (int64_t panel = room.first; panel < room.end; ++panel) {
      multiply_columns<L>(G, room.y + i * count * dy_pitch, dy_pitch,
                          room.v + i * count * room.pitch + (panel - room.first) * L::panel, room.pitch, count, add,
                          weight + (i * p.weight.panels + panel) * G * L::panel, next);
    }
  }
}

// The strips [begin, end): g, and the sums of the weight's gradient and of batch norm's. Returns whether g is finite
// before the mask.
template <class L>
RESNET_FUSED_INLINE bool backward_strips(const DenseConvBackward& p, int64_t begin, int64_t end, int64_t first_panel,
                                         int64_t end_panel, float* scratch, float* weight, double* sum_g,
                                         double* sum_gz) {
  const BackwardRoom room(p, first_panel, end_panel, scratch);
  const int64_t dy_pitch = p.dy_pitch();
  typename L::Vector bad = {};
  for (int64_t index = begin; index < end; ++index) {
    const Strip s = p.strips.at(index);
    write_strip(p.strips, s, room.strip, room.pitch,
                [&](float* out, int64_t pixel, int64_t count) __attribute__((always_inline)) {
                  write_activation<L>(p.input, pixel, count, room.c, room.width, out, room.pitch);
                });
    write_strip(p.strips, s, room.dy, dy_pitch,
                [&](float* out, int64_t pixel, int64_t count)
                    __attribute__((always_inline)) { write_slice<L>(p.gradient, pixel, count, out, dy_pitch); });
    const int64_t groups = p.strips.groups(s), panels = room.end - room.first;
    const int64_t times = groups * Tile2::values * panels * ((p.gradient.G + L::rows - 1) / L::rows);
    NextStrip next(p, room, index + 1, end, times);
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = s.tiles * group / groups, count = s.tiles * (group + 1) / groups - first;
      input_gradient<L>(p, room, s, first, count, sum_g, sum_gz, bad);
      weight_gradient<L>(p, room, s, first, count, index > begin || group > 0, weight, next);
    }
  }
  float lanes[L::lanes];
  store_vector<L>(lanes, bad);
  return std::all_of(lanes, lanes + L::lanes, [](float lane) { return lane == 0; });
}

}  // namespace resnet_fused::cpu
