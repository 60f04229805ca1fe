// The gradient at the raw output under a batch norm, ReLU and pooling, from the one that pixels gathered.
#pragma once

#include "pool.h"

namespace resnet_fused::cpu {

template <class A>
struct PoolVectors {
  const A *a, *b, *d, *scale, *shift;  // [C] each
};

// g is masked where scale*z + shift <= 0; affine: b*z + d is added. The rows of z lie `pitch` apart, all others C.
template <class T, bool affine, class A = acc_t<T>>
RESNET_FUSED_CLONES void apply(T* __restrict dz, const A* __restrict g, const T* __restrict z, int64_t pitch,
                               const PoolVectors<A>& v, int64_t rows, int64_t C) {
  const A* __restrict a = v.a, * __restrict b = v.b, * __restrict d = v.d;
  const A* __restrict scale = v.scale, * __restrict shift = v.shift;
  for (int64_t m = 0; m < rows; ++m, dz += C, g += C, z += pitch) {
    for (int64_t c = 0; c < C; ++c) {
      const A raw = g[c];
      A value = (load(z + c) * scale[c] + shift[c] <= 0 ? A(0) : raw) * a[c];
      if constexpr (affine) value += load(z + c) * b[c] + d[c];
      store(dz + c, value);
    }
  }
}

}  // namespace resnet_fused::cpu
