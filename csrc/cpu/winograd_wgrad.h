// One unit of the weight gradient by Winograd's F(3x3, 2x2): some tiles of the output, some channels of grad, some of
// x.
//
// It takes a block of tiles at a time: transforms those of x and of grad, then adds their products at each point.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "panels.h"
#include "winograd_tiles.h"

namespace resnet_fused::cpu::winograd_wgrad {

inline constexpr int64_t kTiles = 64;  // of a block
inline constexpr int64_t kShort = 8;   // of a sum from zero; such sums are added up, those of blocks, those of parts
// The error of sums of fewer tiles is what their transforms leave, and that of oneDNN's is then less: these are shorter
// and added up with compensation, which takes up to a third more time.
inline constexpr int64_t kFewTiles = 256, kShorter = 4;
inline constexpr int64_t kMost = 128;  // channels of a unit
inline constexpr int64_t kSkew = 32;   // floats between the points' parts, lest all fall on one set of the caches
inline constexpr int64_t kAhead = 4;   // tiles by which pixels are prefetched
alignas(64) inline constexpr float kZeros[kMost] = {};  // a pixel in the padding

struct Geometry {
  int64_t N, H, W, C, P, Q, K, padding[2], rows, columns, tiles;  // rows x columns tiles of an image

  Geometry(int64_t n, int64_t h, int64_t w, int64_t c, int64_t p, int64_t q, int64_t k, const std::vector<int64_t>& pad)
      : N(n),
        H(h),
        W(w),
        C(c),
        P(p),
        Q(q),
        K(k),
        padding{pad[0], pad[1]},
        rows((p + 1) / 2),
        columns((q + 1) / 2),
        tiles(n * rows * columns) {}
};

struct Unit {
  int64_t begin, end, k, k_width, c, c_width;
};

// Buffers of a unit: the pixels of a block of tiles, their transforms, and the sums of products.
template <class L>
struct Buffers {
  static constexpr int64_t kPitch = kMost + 16;  // between tiles of grad
  static constexpr int64_t kXPoint = kTiles * kMost + kSkew, kGradPoint = kTiles * kPitch + kSkew;
  const float* x_pixels[kTiles + kAhead][16];
  const float* grad_pixels[kTiles + kAhead][4];
  AlignedArray<float> x = aligned_array<float>(kPoints * kXPoint);           // [point][panel][tile][kColumns]
  AlignedArray<float> grad = aligned_array<float>(kPoints * kGradPoint);     // [point][tile][kPitch]
  AlignedArray<float> sums = aligned_array<float>(kPoints * kMost * kMost);  // [point][panel][k][kColumns]

  static int64_t sums_of_point(const Unit& unit) {
    return (unit.c_width + L::kColumns - 1) / L::kColumns * unit.k_width * L::kColumns;
  }
};

// The pixels of tiles from `first` on, counted over all images; beyond the last tile, those of the last.
template <class L>
void find_block(Buffers<L>& buffers, const float* grad, const float* x, const Geometry& g, const Unit& unit,
                int64_t first) {
  int64_t column = first % g.columns, row = first / g.columns % g.rows, n = first / (g.columns * g.rows);
  for (int64_t t = 0; t < kTiles + kAhead; ++t) {
    const float* image = x + n * g.H * g.W * g.C + unit.c;
    find_pixels<4>(buffers.x_pixels[t], image, kZeros, 2 * row - g.padding[0], 2 * column - g.padding[1], g.H, g.W,
                   g.C);
    image = grad + n * g.P * g.Q * g.K + unit.k;
    find_pixels<2>(buffers.grad_pixels[t], image, kZeros, 2 * row, 2 * column, g.P, g.Q, g.K);
    if (first + t + 1 >= g.tiles) continue;
    if (++column == g.columns) column = 0, ++row;
    if (row == g.rows) row = 0, ++n;
  }
}

// Both transforms of the first `count` tiles that were found: a panel at a time, for few pages are written at once.
template <class L>
RESNET_FUSED_INLINE void transform_block(Buffers<L>& buffers, const Unit& unit, int64_t count) {
  for (int64_t c = 0; c < unit.c_width; c += L::kColumns) {
    float* to = buffers.x.get() + c * kTiles;
    for (int64_t t = 0; t < count; ++t, to += L::kColumns) {
      transform_tile<L, OfX>(to, Buffers<L>::kXPoint, buffers.x_pixels[t], buffers.x_pixels[t + kAhead], c,
                             unit.c_width);
    }
  }
  for (int64_t k = 0; k < unit.k_width; k += L::kColumns) {
    float* to = buffers.grad.get() + k;
    for (int64_t t = 0; t < count; ++t, to += Buffers<L>::kPitch) {
      transform_tile<L, OfGrad>(to, Buffers<L>::kGradPoint, buffers.grad_pixels[t], buffers.grad_pixels[t + kAhead], k,
                                unit.k_width);
    }
  }
}

// total += part; what is lost by rounding is taken from the next part.
template <class V>
RESNET_FUSED_INLINE void add_compensated(V& total, V& lost, const V& part) {
  const V rest = part - lost, sum = total + rest;
  lost = (sum - total) - rest;
  total = sum;
}

// sums[r][column] (+)= sum over `tiles` of grad[tile][r] * x[tile][column], in registers
template <class L, bool few, int64_t R>
RESNET_FUSED_INLINE void multiply_rows(float* sums, const float* grad, const float* x, int64_t tiles, bool add) {
  using V = typename L::Vector;
  constexpr int64_t length = few ? kShorter : kShort, pitch = Buffers<L>::kPitch;
  V low[R] = {}, high[R] = {}, lost_low[few ? R : 1] = {}, lost_high[few ? R : 1] = {};
  for (; tiles > 0; tiles -= length, grad += length * pitch, x += length * L::kColumns) {
    V short_low[R], short_high[R];
    const auto add_tile = [&](int64_t t) __attribute__((always_inline)) {
      V x0, x1;
      load_vector(x0, x + t * L::kColumns);
      load_vector(x1, x + t * L::kColumns + L::kLanes);
#pragma GCC unroll 16
      for (int64_t r = 0; r < R; ++r) {
        const float value = grad[t * pitch + r];
        if (t == 0) {
          short_low[r] = value * x0;
          short_high[r] = value * x1;
        } else {
          multiply_add(short_low[r], value, x0);
          multiply_add(short_high[r], value, x1);
        }
      }
    };
    if (tiles >= length) {
#pragma GCC unroll 8
      for (int64_t t = 0; t < length; ++t) add_tile(t);
    } else {
      add_tile(0);
      for (int64_t t = 1; t < tiles; ++t) add_tile(t);
    }
#pragma GCC unroll 16
    for (int64_t r = 0; r < R; ++r) {
      if constexpr (few) {
        add_compensated(low[r], lost_low[r], short_low[r]);
        add_compensated(high[r], lost_high[r], short_high[r]);
      } else {
        low[r] += short_low[r];
        high[r] += short_high[r];
      }
    }
  }
#pragma GCC unroll 16
  for (int64_t r = 0; r < R; ++r, sums += L::kColumns) {
    if (add) {
      V old0, old1;
      load_vector(old0, sums);
      load_vector(old1, sums + L::kLanes);
      low[r] += old0;
      high[r] += old1;
    }
    store_vector(sums, low[r]);
    store_vector(sums + L::kLanes, high[r]);
  }
}

template <class L, bool few, int64_t R>
RESNET_FUSED_INLINE void multiply_some(int64_t rows, float* sums, const float* grad, const float* x, int64_t tiles,
                                       bool add) {
  if (rows == R) return multiply_rows<L, few, R>(sums, grad, x, tiles, add);
  if constexpr (R > 1) multiply_some<L, few, R - 1>(rows, sums, grad, x, tiles, add);
}

// The products of a block of tiles at every point; the rows are shared out evenly over as few passes as there can be.
template <class L, bool few>
RESNET_FUSED_INLINE void multiply_block(Buffers<L>& buffers, const Unit& unit, int64_t tiles, bool add) {
  constexpr int64_t most = few ? L::kCompensatedRows : L::kRows;
  const int64_t groups = (unit.k_width + most - 1) / most;
  float* sums = buffers.sums.get();
  for (int64_t point = 0; point < kPoints; ++point) {
    const float* x = buffers.x.get() + point * Buffers<L>::kXPoint;
    const float* grad = buffers.grad.get() + point * Buffers<L>::kGradPoint;
    for (int64_t c = 0; c < unit.c_width; c += L::kColumns, x += kTiles * L::kColumns) {
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t k = unit.k_width * group / groups, rows = unit.k_width * (group + 1) / groups - k;
        multiply_some<L, few, most>(rows, sums, grad + k, x, tiles, add);
        sums += rows * L::kColumns;
      }
    }
  }
}

// out[k][tap][c] of the unit's channels; whether all are finite: 0 times anything else is NaN.
template <class L>
RESNET_FUSED_INLINE bool write_taps(const Buffers<L>& buffers, float* out, const Geometry& g, const Unit& unit) {
  using V = typename L::Vector;
  const int64_t point_step = Buffers<L>::sums_of_point(unit);
  V trap = {};
  for (int64_t k = 0; k < unit.k_width; ++k) {
    for (int64_t c = 0; c < unit.c_width; c += L::kLanes) {
      const float* from = buffers.sums.get() + (c / L::kColumns * unit.k_width + k) * L::kColumns + c % L::kColumns;
      float* to = out + (unit.k + k) * 9 * g.C + unit.c + c;
      const int64_t count = std::min(L::kLanes, unit.c_width - c);
      V half[3][4];
#pragma GCC unroll 4
      for (int64_t column = 0; column < 4; ++column) {
        V m[4], y[3];
#pragma GCC unroll 4
        for (int64_t row = 0; row < 4; ++row) load_vector(m[row], from + (row * 4 + column) * point_step);
        OfSums::apply(m, y);
#pragma GCC unroll 3
        for (int64_t row = 0; row < 3; ++row) half[row][column] = y[row];
      }
#pragma GCC unroll 3
      for (int64_t row = 0; row < 3; ++row) {
        V y[3];
        OfSums::apply(half[row], y);
#pragma GCC unroll 3
        for (int64_t column = 0; column < 3; ++column) {
          trap += y[column] * 0.0f;
          store_some(to + (row * 3 + column) * g.C, y[column], count);
        }
      }
    }
  }
  float sum = 0;
  for (int64_t i = 0; i < L::kLanes; ++i) sum += trap[i];
  return sum == 0;
}

// out[k][tap][c] of the unit's channels, summed over its tiles, of which there is one at least; whether all are finite.
template <class L>
RESNET_FUSED_INLINE bool run_unit(Buffers<L>& buffers, const float* grad, const float* x, float* out, const Geometry& g,
                                  const Unit& unit) {
  for (int64_t first = unit.begin; first < unit.end; first += kTiles) {
    const int64_t count = std::min(kTiles, unit.end - first);
    find_block(buffers, grad, x, g, unit, first);
    transform_block(buffers, unit, count);
    if (g.tiles < kFewTiles) {
      multiply_block<L, true>(buffers, unit, count, first > unit.begin);
    } else {
      multiply_block<L, false>(buffers, unit, count, first > unit.begin);
    }
  }
  return write_taps(buffers, out, g, unit);
}

}  // namespace resnet_fused::cpu::winograd_wgrad
