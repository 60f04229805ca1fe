// Mean and centred second moment per channel of the rows [M, C], block by block while each is in the cache: what
// bn_stats and add_stats_ share.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <functional>
#include <type_traits>
#include <vector>

#include "rows.h"

namespace resnet_fused::cpu {
namespace {

// inf and NaN must not spread through differences: those of other rows, and other blocks, stay what they are.
template <class A>
RESNET_FUSED_INLINE A finite_or_zero(A value) {
  return value - value == 0 ? value : A(0);
}

// pivot[c] = mean of the block, up to rounding. Summed as differences from the first row: exact for near-constant data.
template <class T, class A>
RESNET_FUSED_CLONES void block_mean(const T* __restrict z, int64_t rows, int64_t C, A* __restrict pivot,
                                    A* __restrict sum) {
  for (int64_t c = 0; c < C; ++c) {
    pivot[c] = finite_or_zero(load(z + c));
    sum[c] = 0;
  }
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4, z += 4 * C) {
    for (int64_t c = 0; c < C; ++c) {
      const A d0 = load(z + c) - pivot[c], d1 = load(z + C + c) - pivot[c];
      const A d2 = load(z + 2 * C + c) - pivot[c], d3 = load(z + 3 * C + c) - pivot[c];
      sum[c] += (d0 + d1) + (d2 + d3);
    }
  }
  for (; m < rows; ++m, z += C) {
    for (int64_t c = 0; c < C; ++c) sum[c] += load(z + c) - pivot[c];
  }
  const A inverse = A(1) / static_cast<A>(rows);
  for (int64_t c = 0; c < C; ++c) pivot[c] = finite_or_zero(pivot[c] + sum[c] * inverse);
}

// sum[c] = sum (z - pivot), square[c] = sum (z - pivot)^2; the block is in cache by now.
template <class T, class A>
RESNET_FUSED_CLONES void block_moments(const T* __restrict z, int64_t rows, int64_t C, const A* __restrict pivot,
                                       A* __restrict sum, A* __restrict square) {
  for (int64_t c = 0; c < C; ++c) sum[c] = square[c] = 0;
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4, z += 4 * C) {
    for (int64_t c = 0; c < C; ++c) {
      const A d0 = load(z + c) - pivot[c], d1 = load(z + C + c) - pivot[c];
      const A d2 = load(z + 2 * C + c) - pivot[c], d3 = load(z + 3 * C + c) - pivot[c];
      sum[c] += (d0 + d1) + (d2 + d3);
      square[c] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
    }
  }
  for (; m < rows; ++m, z += C) {
    for (int64_t c = 0; c < C; ++c) {
      const A d = load(z + c) - pivot[c];
      sum[c] += d;
      square[c] += d * d;
    }
  }
}

// Chan's rule on sums about a common origin: total and m2 of `count` rows take in those of `rows` more.
RESNET_FUSED_INLINE void merge(double& total, double& m2, double count, double more_total, double more_m2,
                               double rows) {
  const double delta = count > 0 ? more_total / rows - total / count : 0.0;
  m2 += more_m2 + delta * delta * (count * rows / (count + rows));
  total += more_total;
}

// The origin, near the data, keeps the differences of means exact where the mean is large.
template <class A>
RESNET_FUSED_CLONES void merge_block(double* __restrict total, double* __restrict m2, int64_t count,
                                     const A* __restrict origin, const A* __restrict pivot, const A* __restrict sum,
                                     const A* __restrict square, int64_t rows, int64_t C) {
  const double n = static_cast<double>(rows);
  for (int64_t c = 0; c < C; ++c) {
    const double s = sum[c], about_origin = (static_cast<double>(pivot[c]) - origin[c]) * n + s;
    merge(total[c], m2[c], static_cast<double>(count), about_origin, square[c] - s * s / n, n);
  }
}

RESNET_FUSED_CLONES void merge_chunk(double* __restrict total, double* __restrict m2, int64_t count,
                                     const double* __restrict more_total, const double* __restrict more_m2,
                                     int64_t rows, int64_t C) {
  for (int64_t c = 0; c < C; ++c) {
    merge(total[c], m2[c], static_cast<double>(count), more_total[c], more_m2[c], static_cast<double>(rows));
  }
}

// The moments of the rows of `z`. `first(c)` is the element in the first row; `ready(row, stop)` is called before a
// block is read, by the thread that reads it: what z is made by, if it is made here. Or `ready()` gives each thread
// one.
template <class T, class First, class Ready>
void moments(const Shape& shape, const T* z, const Tensor& mean, const Tensor& m2, const First& first,
             const Ready& ready) {
  using A = acc_t<T>;
  const Partition part(shape);
  const int64_t C = shape.channels;
  std::vector<A> origin(C);
  for (int64_t c = 0; c < C && shape.rows; ++c) origin[c] = finite_or_zero(first(c));
  std::vector<double> totals(std::max<int64_t>(part.chunks, 1) * C), squares(totals.size());  // [chunks, C]
  torch::stable::parallel_for(0, part.chunks, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> pivot(C), sum(C), square(C);
    auto prepare = [&] {
      if constexpr (std::is_invocable_v<Ready>) {
        return ready();
      } else {
        return std::cref(ready);
      }
    }();
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t start = part.first_row(chunk);
      part.for_each_block(chunk, [&](int64_t row, int64_t stop) {
        const T* block = z + row * C;
        prepare(row, stop);
        block_mean(block, stop - row, C, pivot.data(), sum.data());
        block_moments(block, stop - row, C, pivot.data(), sum.data(), square.data());
        merge_block(&totals[chunk * C], &squares[chunk * C], row - start, origin.data(), pivot.data(), sum.data(),
                    square.data(), stop - row, C);
      });
    }
  });
  for (int64_t chunk = 1; chunk < part.chunks; ++chunk) {
    const int64_t start = part.first_row(chunk);
    merge_chunk(totals.data(), squares.data(), start, &totals[chunk * C], &squares[chunk * C],
                part.first_row(chunk + 1) - start, C);
  }
  for (int64_t c = 0; c < C; ++c) {
    data<A>(mean)[c] = static_cast<A>(shape.rows ? origin[c] + totals[c] / static_cast<double>(shape.rows) : 0.0);
    data<A>(m2)[c] = static_cast<A>(squares[c]);
  }
}

}  // namespace
}  // namespace resnet_fused::cpu
