// Sums of a pooled gradient for batch norm's backward, which nobody writes: what max and average pools share.
#pragma once

#include <algorithm>
#include <vector>

#include "pool.h"

namespace resnet_fused::cpu {

template <class A>
struct PoolSums {
  const A *mean, *scale, *shift;  // [C] each
};

// Adds rows of g, masked where scale*z + shift <= 0, and of g * (z - mean) to sum_g and sum_gz. Those of g lie C apart,
// those of z `pitch`.
template <class T, class A = acc_t<T>>
RESNET_FUSED_CLONES void sum_rows(A* __restrict sum_g, A* __restrict sum_gz, const A* __restrict g,
                                  const T* __restrict z, int64_t pitch, const PoolSums<A>& v, int64_t rows, int64_t C) {
  const A* __restrict mean = v.mean, * __restrict scale = v.scale, * __restrict shift = v.shift;
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4, g += 4 * C, z += 4 * pitch) {
    const T *next = z + pitch, *third = z + 2 * pitch, *fourth = z + 3 * pitch;
    for (int64_t c = 0; c < C; ++c) {
      const A z0 = load(z + c), z1 = load(next + c), z2 = load(third + c), z3 = load(fourth + c);
      const A r0 = g[c], r1 = g[C + c], r2 = g[2 * C + c], r3 = g[3 * C + c];
      const A g0 = z0 * scale[c] + shift[c] <= 0 ? A(0) : r0, g1 = z1 * scale[c] + shift[c] <= 0 ? A(0) : r1;
      const A g2 = z2 * scale[c] + shift[c] <= 0 ? A(0) : r2, g3 = z3 * scale[c] + shift[c] <= 0 ? A(0) : r3;
      sum_g[c] += (g0 + g1) + (g2 + g3);
      sum_gz[c] += (g0 * (z0 - mean[c]) + g1 * (z1 - mean[c])) + (g2 * (z2 - mean[c]) + g3 * (z3 - mean[c]));
    }
  }
  for (; m < rows; ++m, g += C, z += pitch) {
    for (int64_t c = 0; c < C; ++c) {
      const A value = load(z + c), raw = g[c], masked = value * scale[c] + shift[c] <= 0 ? A(0) : raw;
      sum_g[c] += masked;
      sum_gz[c] += masked * (value - mean[c]);
    }
  }
}

// Both sums over the pixels of z. `make()` gives each thread what has for_each_piece(first, last, f) with
// f(g, z, first, last), as PoolGather.
template <class T, class Make>
void sum_gradient(const Tensor& z, int64_t pitch, const PoolSums<acc_t<T>>& v, const Tensor& sum_g,
                  const Tensor& sum_gz, const Make& make) {
  using A = acc_t<T>;
  const Partition part{Shape(z)};
  const int64_t C = z.size(1);
  std::vector<double> totals(std::max<int64_t>(part.chunks, 1) * 2 * C);  // [chunks, 2, C]
  torch::stable::parallel_for(0, part.chunks, 1, [&](int64_t begin, int64_t end) {
    auto gather = make();
    std::vector<A> sums(2 * C);  // of one block
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      part.for_each_block(chunk, [&](int64_t first, int64_t stop) {
        std::fill(sums.begin(), sums.end(), A(0));
        gather.for_each_piece(first, stop, [&](const A* g, const T* piece, int64_t row, int64_t last) {
          sum_rows(sums.data(), sums.data() + C, g, piece, pitch, v, last - row, C);
        });
        for (int64_t i = 0; i < 2 * C; ++i) totals[chunk * 2 * C + i] += sums[i];
      });
    }
  });
  for (int64_t chunk = 1; chunk < part.chunks; ++chunk) {
    for (int64_t i = 0; i < 2 * C; ++i) totals[i] += totals[chunk * 2 * C + i];
  }
  for (int64_t c = 0; c < C; ++c) {
    data<A>(sum_g)[c] = static_cast<A>(totals[c]);
    data<A>(sum_gz)[c] = static_cast<A>(totals[C + c]);
  }
}

}  // namespace resnet_fused::cpu
