// Winograd's minimal filtering (Lavin & Gray 2016) for 3x3 kernels: the transforms of F(MxM, 3x3) in one dimension, and
// of tiles in two. A tile of (M+2)^2 inputs becomes as many values, which a product over channels with the transformed
// weight follows, and M^2 outputs come back: for M = 2, 16 multiplications instead of 36.
//
// With M = 2 every output is made of exactly the inputs that a direct sum has: a value that is not finite reaches no
// other output, and zeros give zeros.
#pragma once

#include "product.h"

namespace resnet_fused::cpu {

template <int64_t M>
struct Filtering;

template <>
struct Filtering<2> {
  static constexpr int64_t outputs = 2, inputs = 4, values = inputs * inputs;

  template <class V>
  static RESNET_FUSED_INLINE void input(V* r, const V* d) {
    r[0] = d[0] - d[2];
    r[1] = d[1] + d[2];
    r[2] = d[2] - d[1];
    r[3] = d[1] - d[3];
  }
  template <class V>
  static RESNET_FUSED_INLINE void weight(V* r, const V* g) {
    const V even = 0.5f * (g[0] + g[2]), odd = 0.5f * g[1];
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

// u[value][k] (planes `plane` apart) = the transform of the taps g[r * 3 + s][k] of one panel of output channels.
template <class L, class F>
RESNET_FUSED_INLINE void transform_weight(float* u, int64_t plane, const float* g) {
  using V = typename L::Vector;
  constexpr int64_t A = F::inputs;
  for (int64_t k = 0; k < L::panel; k += L::lanes) {
    V columns[3][A];
#pragma GCC unroll 4
    for (int64_t s = 0; s < 3; ++s) {
      V taps[3];
#pragma GCC unroll 4
      for (int64_t r = 0; r < 3; ++r) load_vector<L>(taps[r], g + (r * 3 + s) * L::panel + k);
      F::weight(columns[s], taps);
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < A; ++i) {
      const V taps[3] = {columns[0][i], columns[1][i], columns[2][i]};
      V r[A];
      F::weight(r, taps);
#pragma GCC unroll 8
      for (int64_t j = 0; j < A; ++j) store_vector<L>(u + (i * A + j) * plane + k, r[j]);
    }
  }
}

// y[i][j] = the outputs of a tile, for the vector at `m` of every plane.
template <class L, class F>
RESNET_FUSED_INLINE void transform_output(typename L::Vector (&y)[F::outputs][F::outputs], const float* m,
                                          int64_t plane) {
  using V = typename L::Vector;
  constexpr int64_t A = F::inputs, M = F::outputs;
  V columns[A][M];
#pragma GCC unroll 8
  for (int64_t j = 0; j < A; ++j) {
    V d[A];
#pragma GCC unroll 8
    for (int64_t i = 0; i < A; ++i) load_vector<L>(d[i], m + (i * A + j) * plane);
    F::output(columns[j], d);
  }
#pragma GCC unroll 4
  for (int64_t i = 0; i < M; ++i) {
    V d[A];
#pragma GCC unroll 8
    for (int64_t j = 0; j < A; ++j) d[j] = columns[j][i];
    F::output(y[i], d);
  }
}

}  // namespace resnet_fused::cpu
