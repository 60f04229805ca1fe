// Transforms of tiles for the weight gradient by Winograd's F(3x3, 2x2).
//
// With Z a tile of 4x4 pixels of x and Y the 2x2 pixels of grad whose nine products with it are wanted:
//   sum over tiles of A' [(G Y G') * (B' Z B)] A,   * by elements
//   B' = 1  0 -1  0    G = 1  0     A' = 1 1/2  1/2  0
//        0  1  1  0        1  1          0 1/2 -1/2  0
//        0 -1  1  0        1 -1          0 1/2  1/2 -1
//        0  1  0 -1        0  1
// The halves stand in A, which is applied once, so that the smallest gradients lose no digits to them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "winograd.h"

namespace resnet_fused::cpu::winograd_wgrad {

inline constexpr int64_t kPoints = 16;  // of a transformed tile

// Vectors, and how many rows of two vectors of sums are made in registers at a time, with compensation or without.
template <int bytes, int64_t rows, int64_t compensated_rows>
struct Level {
  typedef float Vector __attribute__((vector_size(bytes)));
  static constexpr int64_t kLanes = bytes / sizeof(float), kColumns = 2 * kLanes;
  static constexpr int64_t kRows = rows, kCompensatedRows = compensated_rows;
};

template <class V>
RESNET_FUSED_INLINE void load_vector(V& v, const float* p) {
  std::memcpy(&v, p, sizeof v);
}

template <class V>
RESNET_FUSED_INLINE void store_vector(float* p, const V& v) {
  std::memcpy(p, &v, sizeof v);
}

// The first `count`, which may be all or none; zeros beyond.
template <class V>
RESNET_FUSED_INLINE void load_some(V& v, const float* p, int64_t count) {
  constexpr int64_t lanes = sizeof(V) / sizeof(float);
  if (count >= lanes) return load_vector(v, p);
  float some[lanes] = {};
  for (int64_t i = 0; i < count; ++i) some[i] = p[i];
  load_vector(v, some);
}

// The first `count`, which may be all.
template <class V>
RESNET_FUSED_INLINE void store_some(float* p, const V& v, int64_t count) {
  constexpr int64_t lanes = sizeof(V) / sizeof(float);
  if (count >= lanes) return store_vector(p, v);
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
}

struct OfX {  // out = B' d
  static constexpr int64_t kSize = 4;
  template <class V>
  static RESNET_FUSED_INLINE void apply(const V* d, V* out) {
    Filtering<2>::input(out, d);
  }
};

struct OfGrad {  // out = G d
  static constexpr int64_t kSize = 2;
  template <class V>
  static RESNET_FUSED_INLINE void apply(const V* d, V* out) {
    out[0] = d[0];
    out[1] = d[0] + d[1];
    out[2] = d[0] - d[1];
    out[3] = d[1];
  }
};

struct OfSums {  // out = A' m
  template <class V>
  static RESNET_FUSED_INLINE void apply(const V* m, V* out) {
    const V both = (m[1] + m[2]) * 0.5f;
    out[0] = m[0] + both;
    out[1] = (m[1] - m[2]) * 0.5f;
    out[2] = both - m[3];
  }
};

// Pointers to size x size pixels from (h, w) on, to `zeros` where there are none.
template <int64_t size>
inline void find_pixels(const float** pixels, const float* image, const float* zeros, int64_t h, int64_t w, int64_t H,
                        int64_t W, int64_t C) {
  for (int64_t i = 0; i < size; ++i) {
    for (int64_t j = 0; j < size; ++j) {
      const bool inside = h + i >= 0 && h + i < H && w + j >= 0 && w + j < W;
      pixels[i * size + j] = inside ? image + ((h + i) * W + w + j) * C : zeros;
    }
  }
}

// One vector of channels of a tile, from channel c on: to[point * step]. `next` are the pixels of a later tile.
template <class L, class Transform, bool whole>
RESNET_FUSED_INLINE void transform_vector(float* to, int64_t step, const float* const* pixels, const float* const* next,
                                          int64_t c, int64_t width) {
  using V = typename L::Vector;
  constexpr int64_t size = Transform::kSize;
  V half[4][size];
#pragma GCC unroll 4
  for (int64_t column = 0; column < size; ++column) {
    V d[size], out[4];
#pragma GCC unroll 4
    for (int64_t row = 0; row < size; ++row) {
      const int64_t pixel = row * size + column;
      if constexpr (whole) {
        load_vector(d[row], pixels[pixel] + c);
      } else {
        load_some(d[row], pixels[pixel] + c, width - c);
      }
      if (column >= size - 2) __builtin_prefetch(next[pixel] + c);
    }
    Transform::apply(d, out);
#pragma GCC unroll 4
    for (int64_t row = 0; row < 4; ++row) half[row][column] = out[row];
  }
#pragma GCC unroll 4
  for (int64_t row = 0; row < 4; ++row) {
    V out[4];
    Transform::apply(half[row], out);
#pragma GCC unroll 4
    for (int64_t column = 0; column < 4; ++column) store_vector(to + (row * 4 + column) * step, out[column]);
  }
}

// A panel of channels of a tile, from channel c on; zeros beyond `width` channels.
template <class L, class Transform>
RESNET_FUSED_INLINE void transform_tile(float* to, int64_t step, const float* const* pixels, const float* const* next,
                                        int64_t c, int64_t width) {
#pragma GCC unroll 2
  for (int64_t i = 0; i < 2; ++i, to += L::kLanes, c += L::kLanes) {
    if (c + L::kLanes <= width) {
      transform_vector<L, Transform, true>(to, step, pixels, next, c, width);
    } else {
      transform_vector<L, Transform, false>(to, step, pixels, next, c, width);
    }
  }
}

}  // namespace resnet_fused::cpu::winograd_wgrad
