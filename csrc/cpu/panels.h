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

// g[r][j] += sum_m a[m][r] * b[m][j] for R rows and kPanel columns. Rows of a are `stride` apart; g has rows of kMacro,
// of any floating-point type. R is 4 to 6: 2 R sums in flight hide the latency of FMA and still fit 16 registers.
template <int64_t R, int64_t stride, class G, class A>
RESNET_FUSED_INLINE void multiply_tile(G* __restrict g, const A* __restrict a, const A* __restrict b, int64_t rows) {
  constexpr int64_t P = kPanel<A>, half = P / 2;
  typedef A Vector __attribute__((vector_size(32)));
  Vector low[R] = {}, high[R] = {};
  for (int64_t m = 0; m < rows; ++m, a += stride, b += P) {
    const Vector b0 = *reinterpret_cast<const Vector*>(b), b1 = *reinterpret_cast<const Vector*>(b + half);
#pragma GCC unroll 8
    for (int64_t r = 0; r < R; ++r) {
      low[r] += a[r] * b0;
      high[r] += a[r] * b1;
    }
  }
  for (int64_t r = 0; r < R; ++r, g += kMacro) {
    for (int64_t i = 0; i < half; ++i) {
      g[i] += low[r][i];
      g[half + i] += high[r][i];
    }
  }
}

}  // namespace resnet_fused::cpu
