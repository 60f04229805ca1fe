// Winograd's minimal filtering (Lavin & Gray 2016) for 3x3 kernels: the transforms of F(MxM, 3x3) in one dimension, and
// of tiles in two. A tile of (M+2)^2 inputs becomes as many values, which a product over channels with the transformed
// weight follows, and M^2 outputs come back: for M = 2, 16 multiplications instead of 36; for M = 4, 36 instead of 144.
//
// With M = 2 every output is made of exactly the inputs that a direct sum has: a value that is not finite reaches no
// other output, and zeros give zeros. With M = 4 all inputs of a tile take part in all its outputs, to cancel up to
// rounding. Its points are 0, +-0.625, +-1.5 and infinity: with the usual +-1 and +-2 errors are twice as large.
#pragma once

#include <type_traits>

#include "product.h"

namespace resnet_fused::cpu {

// Of all: how many outputs and pixels there are to a side, and how many sums over channels become outputs; sum i is of
// depth(i) values from first(i) on. place: where a value lies among all, those of one sum side by side.
template <int64_t M>
struct Filtering;

template <>
struct Filtering<2> {
  static constexpr int64_t outputs = 2, inputs = 4, values = inputs * inputs, sums = inputs, stride = 1;
  static constexpr int64_t depth(int64_t) { return 1; }
  static constexpr int64_t first(int64_t sum) { return sum; }
  static constexpr int64_t place(int64_t i, int64_t j) { return i * inputs + j; }

  template <class V>
  static RESNET_FUSED_INLINE void input(V* r, const V* d) {
    r[0] = d[0] - d[2];
    r[1] = d[1] + d[2];
    r[2] = d[2] - d[1];
    r[3] = d[1] - d[3];
  }
  template <class V>
  static RESNET_FUSED_INLINE void weight(V* r, const V* g) {
    using E = std::remove_cvref_t<decltype(r[0][0])>;
    const V even = E(0.5) * (g[0] + g[2]), odd = E(0.5) * g[1];
    r[0] = g[0];
    r[1] = even + odd;
    r[2] = even - odd;
    r[3] = g[2];
  }
  template <class V>
  static RESNET_FUSED_INLINE void output(V* y, const V* m) {
    y[0] = m[0] + (m[1] + m[2]);
    y[1] = (m[1] - m[2]) - m[3];
  }
};

template <>
struct Filtering<4> {
  static constexpr int64_t outputs = 4, inputs = 6, values = inputs * inputs, sums = inputs, stride = 1;
  static constexpr int64_t depth(int64_t) { return 1; }
  static constexpr int64_t first(int64_t sum) { return sum; }
  static constexpr int64_t place(int64_t i, int64_t j) { return i * inputs + j; }
  // The points, and what of their powers is used; all but those of `weight` are exact in float.
  static constexpr double a = 0.625, b = 1.5, a2 = a * a, b2 = b * b;

  template <class V>
  static RESNET_FUSED_INLINE void input(V* r, const V* d) {
    constexpr float kA = a, kB = b, kA2 = a2, kB2 = b2, kProduct = a2 * b2, kSum = a2 + b2;
    const V even_a = d[4] - kB2 * d[2], odd_a = d[3] - kB2 * d[1];
    const V even_b = d[4] - kA2 * d[2], odd_b = d[3] - kA2 * d[1];
    r[0] = kProduct * d[0] + (d[4] - kSum * d[2]);
    r[1] = even_a + kA * odd_a;
    r[2] = even_a - kA * odd_a;
    r[3] = even_b + kB * odd_b;
    r[4] = even_b - kB * odd_b;
    r[5] = kProduct * d[1] + (d[5] - kSum * d[3]);
  }
  template <class V>
  static RESNET_FUSED_INLINE void weight(V* r, const V* g) {
    using E = std::remove_cvref_t<decltype(r[0][0])>;
    constexpr double of_a = 1 / (2 * a2 * (a2 - b2)), of_b = 1 / (2 * b2 * (b2 - a2));
    const V even_a = E(of_a) * g[0] + E(of_a * a2) * g[2], odd_a = E(of_a * a) * g[1];
    const V even_b = E(of_b) * g[0] + E(of_b * b2) * g[2], odd_b = E(of_b * b) * g[1];
    r[0] = E(1 / (a2 * b2)) * g[0];
    r[1] = even_a + odd_a;
    r[2] = even_a - odd_a;
    r[3] = even_b + odd_b;
    r[4] = even_b - odd_b;
    r[5] = g[2];
  }
  template <class V>
  static RESNET_FUSED_INLINE void output(V* y, const V* m) {
    constexpr float kA = a, kB = b, kA2 = a2, kB2 = b2, kA3 = a2 * a, kB3 = b2 * b;
    const V sum_a = m[1] + m[2], difference_a = m[1] - m[2];
    const V sum_b = m[3] + m[4], difference_b = m[3] - m[4];
    y[0] = m[0] + (sum_a + sum_b);
    y[1] = kA * difference_a + kB * difference_b;
    y[2] = kA2 * sum_a + kB2 * sum_b;
    y[3] = kA3 * difference_a + (kB3 * difference_b + m[5]);
  }
};

// F(2x2, 3x3) with a stride of 2: the even pixels of five meet two taps, the odd ones the third, each its own output.
// Of the former F(2, 2), with the points 0, 1 and infinity; the latter are added to what one output has for itself. So
// 25 multiplications instead of 36, and as with M = 2 above every output is made of its inputs alone.
struct Strided {
  static constexpr int64_t outputs = 2, inputs = 5, values = inputs * inputs, sums = 3, stride = 2;
  static constexpr int64_t depth(int64_t i) { return i == 1 ? 1 : 2; }
  static constexpr int64_t sum(int64_t i) { return i / 2 + (i == 3); }            // of value i: 0 0 1 2 2
  static constexpr int64_t first(int64_t sum) { return sum == 2 ? 3 : 2 * sum; }  // value of a sum
  static constexpr int64_t place(int64_t i, int64_t j) {
    const int64_t p = sum(i), q = sum(j);
    return first(p) * inputs + depth(p) * first(q) + (i - first(p)) * depth(q) + j - first(q);
  }

  template <class V>
  static RESNET_FUSED_INLINE void input(V* r, const V* d) {
    r[0] = d[0] - d[2];
    r[1] = d[1];
    r[2] = d[2];
    r[3] = d[4] - d[2];
    r[4] = d[3];
  }
  template <class V>
  static RESNET_FUSED_INLINE void weight(V* r, const V* g) {
    r[0] = g[0];
    r[1] = g[1];
    r[2] = g[0] + g[2];
    r[3] = g[2];
    r[4] = g[1];
  }
  template <class V>
  static RESNET_FUSED_INLINE void output(V* y, const V* m) {
    y[0] = m[0] + m[1];
    y[1] = m[1] + m[2];
  }
};

// v[i * inputs + j] (planes `plane` apart) = the transform of the vectors at pixels[i][j] + c.
template <class L, class F>
RESNET_FUSED_INLINE void input_vectors(float* v, int64_t plane, const float* const (&pixels)[F::inputs][F::inputs],
                                       int64_t c, int64_t ahead) {
  using V = typename L::Vector;
  constexpr int64_t A = F::inputs;
  V columns[A][A];
#pragma GCC unroll 8
  for (int64_t j = 0; j < A; ++j) {
    V d[A];
#pragma GCC unroll 8
    for (int64_t i = 0; i < A; ++i) {
      load_vector<L>(d[i], pixels[i][j] + c);
      if (j >= 2) __builtin_prefetch(pixels[i][j] + c + ahead);
    }
    F::input(columns[j], d);
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < A; ++i) {
    V d[A], r[A];
#pragma GCC unroll 8
    for (int64_t j = 0; j < A; ++j) d[j] = columns[j][i];
    F::input(r, d);
#pragma GCC unroll 8
    for (int64_t j = 0; j < A; ++j) store_vector<L>(v + (i * A + j) * plane + c, r[j]);
  }
}

// The transform of a tile, whose pixels have `channels` values; `v` has room for whole vectors. `ahead`: how far behind
// a pixel that of a later tile lies, which is fetched meanwhile.
template <class L, class F>
RESNET_FUSED_INLINE void transform_input(float* v, int64_t plane, const float* const (&pixels)[F::inputs][F::inputs],
                                         int64_t channels, int64_t ahead) {
  const int64_t whole = channels / L::lanes * L::lanes;
  for (int64_t c = 0; c < whole; c += L::lanes) input_vectors<L, F>(v, plane, pixels, c, ahead);
  if (whole == channels) return;
  float rest[F::values][L::lanes] = {};
  const float* copies[F::inputs][F::inputs];
  for (int64_t i = 0; i < F::values; ++i) {
    const float* pixel = pixels[i / F::inputs][i % F::inputs] + whole;
    for (int64_t c = 0; c < channels - whole; ++c) rest[i][c] = pixel[c];
    copies[i / F::inputs][i % F::inputs] = rest[i];
  }
  input_vectors<L, F>(v + whole, plane, copies, 0, 0);
}

// u[value][k] (planes `plane` apart) = the transform of the taps g[r * 3 + s][k] of one panel of output channels, of
// Tap: float, or double, in which taps have a factor each and are rounded once.
template <class L, class F, class Tap>
RESNET_FUSED_INLINE void transform_weight(float* u, int64_t plane, const Tap* g) {
  typedef Tap V __attribute__((vector_size(L::lanes * sizeof(Tap))));
  typedef Tap Anywhere __attribute__((vector_size(L::lanes * sizeof(Tap)), aligned(alignof(Tap)), may_alias));
  constexpr int64_t A = F::inputs;
  for (int64_t k = 0; k < L::panel; k += L::lanes) {
    V columns[3][A];
#pragma GCC unroll 4
    for (int64_t s = 0; s < 3; ++s) {
      V taps[3];
#pragma GCC unroll 4
      for (int64_t r = 0; r < 3; ++r) taps[r] = *reinterpret_cast<const Anywhere*>(g + (r * 3 + s) * L::panel + k);
      F::weight(columns[s], taps);
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < A; ++i) {
      const V taps[3] = {columns[0][i], columns[1][i], columns[2][i]};
      V r[A];
      F::weight(r, taps);
#pragma GCC unroll 8
      for (int64_t j = 0; j < A; ++j) {
        const typename L::Vector rounded = __builtin_convertvector(r[j], typename L::Vector);
        store_vector<L>(u + F::place(i, j) * plane + k, rounded);
      }
    }
  }
}

// y[i][j] = the outputs of a tile, for the vector at `m` of every plane.
template <class L, class F>
RESNET_FUSED_INLINE void transform_output(typename L::Vector (&y)[F::outputs][F::outputs], const float* m,
                                          int64_t plane) {
  using V = typename L::Vector;
  constexpr int64_t A = F::sums, M = F::outputs;
  V columns[A][M];
#pragma GCC unroll 8
  for (int64_t j = 0; j < A; ++j) {
    V d[A];
#pragma GCC unroll 8
    for (int64_t i = 0; i < A; ++i) load_vector<L>(d[i], m + (i * A + j) * plane);
    F::output(columns[j], d);
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < M; ++i) {
    V d[A];
#pragma GCC unroll 8
    for (int64_t j = 0; j < A; ++j) d[j] = columns[j][i];
    F::output(y[i], d);
  }
}

}  // namespace resnet_fused::cpu
