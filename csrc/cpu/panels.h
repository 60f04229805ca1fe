// Register-blocked products of packed panels, shared by the kernels that multiply long, thin matrices (x' y).
//
// A panel holds one cache line per row: kPanel channels of kDepth rows. Two panels fit the first-level cache.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

#include "simd.h"

namespace resnet_fused::cpu {

inline constexpr int64_t kMacro = 128;  // channels of a macro tile
inline constexpr int64_t kDepth = 208;  // rows of a panel

template <class A>
constexpr int64_t kPanel = 64 / sizeof(A);  // channels

struct AlignedDelete {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
};

template <class A>
using AlignedArray = std::unique_ptr<A[], AlignedDelete>;

template <class A>
AlignedArray<A> aligned_array(int64_t size) {
  return AlignedArray<A>(static_cast<A*>(::operator new(static_cast<size_t>(size) * sizeof(A), std::align_val_t(64))));
}

// Half of a panel's row: one AVX2 register.
template <class A>
struct HalfPanel {
  typedef A type __attribute__((vector_size(32)));
};

// R rows of sums of one panel, in registers. R is 4 to 6: 2 R sums in flight hide the latency of FMA and still fit 16
// registers.
template <class A, int64_t R>
struct RegisterTile {
  typename HalfPanel<A>::type low[R] = {}, high[R] = {};

  // sums[r][j] += sum_m a[r * row + m * step] * b[m][j]
  template <int64_t row, int64_t step>
  RESNET_FUSED_INLINE void accumulate(const A* __restrict a, const A* __restrict b, int64_t depth) {
    using Vector = typename HalfPanel<A>::type;
    constexpr int64_t P = kPanel<A>;
    for (int64_t m = 0; m < depth; ++m, a += step, b += P) {
      const Vector b0 = *reinterpret_cast<const Vector*>(b), b1 = *reinterpret_cast<const Vector*>(b + P / 2);
#pragma GCC unroll 8
      for (int64_t r = 0; r < R; ++r) {
        low[r] += a[r * row] * b0;
        high[r] += a[r * row] * b1;
      }
    }
  }
};

// g[r][j] += sum_m a[m][r] * b[m][j] for R rows and kPanel columns. Rows of a are `stride` apart, rows of g `pitch`; g
// is of any floating-point type.
template <int64_t R, int64_t stride, class G, class A>
RESNET_FUSED_INLINE void multiply_tile(G* __restrict g, const A* __restrict a, const A* __restrict b, int64_t rows,
                                       int64_t pitch = kMacro) {
  constexpr int64_t half = kPanel<A> / 2;
  RegisterTile<A, R> sums;
  sums.template accumulate<1, stride>(a, b, rows);
  for (int64_t r = 0; r < R; ++r, g += pitch) {
    for (int64_t i = 0; i < half; ++i) {
      g[i] += sums.low[r][i];
      g[half + i] += sums.high[r][i];
    }
  }
}

}  // namespace resnet_fused::cpu
