// The stages of conv_pointwise.h: a panel of the weight packed, rows of pixels gathered, their products finished in
// registers and written once.
#pragma once

#include <algorithm>
#include <limits>
#include <utility>

#include "conv1x1_values.h"
#include "conv_pointwise.h"

namespace resnet_fused::cpu {

inline constexpr int64_t kPage = 1024;   // floats; rows so far apart share a set of the first-level cache,
inline constexpr int64_t kAliased = 10;  // which holds so many lines beside those of the panel

// v[r][j] becomes v[j][r], by halves that change places between vectors 1, 2, 4, .. apart.
template <class V, int64_t lanes, int64_t apart, size_t... i>
RESNET_FUSED_INLINE void exchange(V* v, std::index_sequence<i...>) {
#pragma GCC unroll 16
  for (int64_t r = 0; r < lanes; ++r) {
    if (r & apart) continue;
    const V a = v[r], b = v[r + apart];
    v[r] = __builtin_shufflevector(a, b, (i & apart ? lanes + (i ^ apart) : i)...);
    v[r + apart] = __builtin_shufflevector(a, b, (i & apart ? lanes + i : (i ^ apart))...);
  }
}

template <class L, int64_t apart = 1>
RESNET_FUSED_INLINE void transpose(typename L::Vector* v) {
  if constexpr (apart < L::lanes) {
    exchange<typename L::Vector, L::lanes, apart>(v, std::make_index_sequence<L::lanes>());
    transpose<L, 2 * apart>(v);
  }
}

// packed[k][j] = w[j * depth + k] for `columns` rows of a panel, zeros beyond.
template <class L>
RESNET_FUSED_INLINE void pack_rows_of_panel(const float* w, int64_t columns, int64_t depth, float* packed) {
  for (int64_t i = 0; i < columns * depth; i += 16) __builtin_prefetch(w + i, 0, 2);
  for (int64_t j = 0; j < L::panel; j += L::lanes) {
    const int64_t there = std::clamp(columns - j, int64_t(0), L::lanes);
    int64_t k = 0;
    for (; k + L::lanes <= depth; k += L::lanes) {
      typename L::Vector v[L::lanes] = {};
      if (there == L::lanes) {
#pragma GCC unroll 16
        for (int64_t i = 0; i < L::lanes; ++i) load_vector<L>(v[i], w + (j + i) * depth + k);
      } else {
        for (int64_t i = 0; i < there; ++i) load_vector<L>(v[i], w + (j + i) * depth + k);
      }
      transpose<L>(v);
#pragma GCC unroll 16
      for (int64_t i = 0; i < L::lanes; ++i) store_vector<L>(packed + (k + i) * L::panel + j, v[i]);
    }
    for (; k < depth; ++k) {
      for (int64_t i = 0; i < L::lanes; ++i) packed[k * L::panel + j + i] = i < there ? w[(j + i) * depth + k] : 0.0f;
    }
  }
}

// A panel of the weight and what it takes of vectors: [C][panel], [panel], [panel].
template <class L>
RESNET_FUSED_INLINE void pack_pointwise(const Pointwise& p, int64_t panel, float* packed) {
  const int64_t k = panel * L::panel, columns = std::min(L::panel, p.K - k);
  pack_rows_of_panel<L>(p.weight + k * p.C, columns, p.C, packed);
  float *scale = packed + p.C * L::panel, *shift = scale + L::panel;
  for (int64_t j = 0; j < L::panel; ++j) scale[j] = 0, shift[j] = 0;
  for (int64_t j = 0; j < columns; ++j) p.behind.affine(k + j, scale[j], shift[j]);
}

// Where the products of a group of rows go.
struct Target {
  float* out;
  const float* residual;  // null: none
  int64_t pitch;
  float least;  // what is below becomes 0
};

// What is read later, of which a group of rows fetches a cache line every few steps: rows of x and of the weight. Null:
// nothing.
struct Later {
  const float *x, *weight, *weight_end;
};

// How many steps: so many that a group fetches as many rows as it has.
template <class L>
constexpr int64_t steps_apart() {
  return std::min(kLine / L::rows, L::steps);
}

// sums[r][j] += a[r][k] * b[k][j] for k in [from, to), for R rows and the first V vectors of a panel.
template <class L, bool fetches, int64_t R, int64_t V, class Besides>
RESNET_FUSED_INLINE void add_products(typename L::Vector (&sums)[R][V], const float* a, int64_t a_pitch, const float* b,
                                      int64_t from, int64_t to, const Later& later, const Besides& besides) {
  constexpr int64_t kAhead = 16;  // rows of the panel, on their way from the second-level cache
  constexpr int64_t kApart = steps_apart<L>();
  for_steps<L>(from, to, [&](int64_t k, int64_t i) __attribute__((always_inline)) {
    typename L::Vector columns[V];
    if constexpr (L::fetches) {
#pragma GCC unroll 2
      for (int64_t j = 0; j < V * L::lanes; j += kLine) __builtin_prefetch(b + (k + kAhead) * L::panel + j);
    }
#pragma GCC unroll 2
    for (int64_t j = 0; j < V; ++j) load_vector<L>(columns[j], b + k * L::panel + j * L::lanes);
    if (fetches && i % kApart == 0) {
      __builtin_prefetch(later.x + k * kLine / kApart);
      __builtin_prefetch(later.weight + k * kLine / kApart, 0, 2);
    }
    besides(k);
#pragma GCC unroll 16
    for (int64_t r = 0; r < R; ++r) {
      const float value = a[r * a_pitch + k];
#pragma GCC unroll 2
      for (int64_t j = 0; j < V; ++j) multiply_add(sums[r][j], value, columns[j]);
    }
  });
}

template <class L, bool fetches, int64_t R, int64_t V, bool adds>
RESNET_FUSED_INLINE void finish_group(const float* a, int64_t a_pitch, const float* b, int64_t depth,
                                      const Later& later, const Target& t) {
  using Vector = typename L::Vector;
  Vector sums[R][V] = {};
  const int64_t first = std::min(std::max(R, L::steps), depth);
  add_products<L, fetches, R, V>(sums, a, a_pitch, b, 0, first, later, [&](int64_t r) __attribute__((always_inline)) {
    if (r >= R) return;
#pragma GCC unroll 2
    for (int64_t j = 0; j < V; ++j) {
      __builtin_prefetch(t.out + r * t.pitch + j * L::lanes, 1);
      if (adds) __builtin_prefetch(t.residual + r * t.pitch + j * L::lanes);
    }
  });
  add_products<L, fetches, R, V>(sums, a, a_pitch, b, first, depth, later, [](int64_t) {});
  b += depth * L::panel;
  const Vector zero = {}, least = zero + t.least;
#pragma GCC unroll 2
  for (int64_t j = 0; j < V; ++j) {
    Vector scale, shift;
    load_vector<L>(scale, b + j * L::lanes), load_vector<L>(shift, b + L::panel + j * L::lanes);
#pragma GCC unroll 16
    for (int64_t r = 0; r < R; ++r) {
      Vector value = sums[r][j] * scale + shift;
      if constexpr (adds) {
        Vector residual;
        load_vector<L>(residual, t.residual + r * t.pitch + j * L::lanes);
        value += residual;
      }
      value = least > value ? least : value;  // NaN and -0.0 pass
      store_vector<L>(t.out + r * t.pitch + j * L::lanes, value);
    }
  }
}

template <class L, bool fetches, int64_t R, int64_t V, bool adds>
RESNET_FUSED_INLINE void finish_group_of(int64_t rows, const float* a, int64_t a_pitch, const float* b, int64_t depth,
                                         const Later& later, const Target& t) {
  if constexpr (R > 0) {
    if (rows == R) return finish_group<L, fetches, R, V, adds>(a, a_pitch, b, depth, later, t);
    finish_group_of<L, fetches, R - 1, V, adds>(rows, a, a_pitch, b, depth, later, t);
  }
}

// The same for the columns that there are of a panel, at most V vectors: what is less than these goes by way of
// `spare`.
template <class L, int64_t V, bool adds>
RESNET_FUSED_INLINE void finish_columns(int64_t columns, int64_t rows, const float* a, int64_t a_pitch, const float* b,
                                        int64_t depth, const Later& later, const Target& t) {
  const bool whole = columns == V * L::lanes;
  alignas(64) float spare[L::rows * L::panel];
  for (int64_t r = 0; adds && !whole && r < rows; ++r) {
    float* to = spare + r * L::panel;
    std::fill(std::copy_n(t.residual + r * t.pitch, columns, to), to + L::panel, 0.0f);
  }
  const Target to = whole ? t : Target{spare, spare, L::panel, t.least};
  const bool fetches = later.x || later.weight;
  if (L::fetches || (V == kVectors && fetches)) {
    const Later near{later.x ? later.x : b, later.weight ? later.weight : b, nullptr};
    finish_group_of<L, true, L::rows, V, adds>(rows, a, a_pitch, b, depth, near, to);  // once: compiled here
  } else {
    finish_group_of<L, false, L::rows, V, adds>(rows, a, a_pitch, b, depth, later, to);
  }
  for (int64_t r = 0; !whole && r < rows; ++r) std::copy_n(spare + r * L::panel, columns, t.out + r * t.pitch);
}

// Rows of the output, and where their pixels lie in x; `next`: where those of the next tile do, null where gaps are
// between.
struct Tile {
  int64_t row, rows;
  const float *x, *next;
};

// A tile by a packed panel.
template <class L, bool adds>
RESNET_FUSED_INLINE void multiply_tile_by(const Pointwise& p, const Tile& tile, int64_t panel, const float* packed,
                                          Later& later) {
  const int64_t k = panel * L::panel, columns = std::min(L::panel, p.K - k), pitch = p.pixels.step * p.C;
  const float least = p.behind.relu ? 0.0f : -std::numeric_limits<float>::infinity();
  const int64_t most = pitch % kPage == 0 ? std::min(L::rows, kAliased) : L::rows;
  const int64_t groups = (tile.rows + most - 1) / most;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t begin = tile.rows * group / groups, count = tile.rows * (group + 1) / groups - begin;
    const int64_t at = (tile.row + begin) * p.K + k;
    const Target t{p.out + at, adds ? p.behind.residual + at : nullptr, p.K, least};
    later.x = tile.next ? tile.next + begin * pitch : nullptr;
    const float* a = tile.x + begin * pitch;
    columns > L::lanes ? finish_columns<L, kVectors, adds>(columns, count, a, pitch, packed, p.C, later, t)
                       : finish_columns<L, 1, adds>(columns, count, a, pitch, packed, p.C, later, t);
    if (later.weight) later.weight += p.C * kLine / steps_apart<L>();
    if (later.weight >= later.weight_end) later.weight = nullptr;
  }
}

template <class L>
RESNET_FUSED_INLINE void multiply_tile(const Pointwise& p, const Tile& tile, int64_t panel, const float* packed,
                                       Later& later) {
  p.behind.residual ? multiply_tile_by<L, true>(p, tile, panel, packed, later)
                    : multiply_tile_by<L, false>(p, tile, panel, packed, later);
}

}  // namespace resnet_fused::cpu
