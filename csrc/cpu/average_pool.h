// Averages over windows without padding, in channels_last images: the gradient that each pixel gets from the windows
// that cover it.
#pragma once

#include <algorithm>
#include <vector>

#include "../checks/average_pooling.h"
#include "pool.h"

namespace resnet_fused::cpu {

inline PoolShape averaged_shape(const Tensor& x, const std::vector<int64_t>& kernel,
                                const std::vector<int64_t>& stride) {
  return PoolShape(x, kernel, stride, {0, 0});
}

// Windows [first, last) of a row of them that cover a column of pixels.
struct AverageColumn {
  int64_t first, last;
};

// g of `pixels` pixels, [pixels, C], before the ReLU's mask. rows: gradients of the rows of windows that cover theirs.
template <class T, class A = acc_t<T>>
RESNET_FUSED_CLONES void spread_pixels(A* __restrict g, const T* const* rows, int64_t row_count,
                                       const AverageColumn* columns, int64_t pixels, int64_t C, A inverse) {
  for (int64_t x = 0; x < pixels; ++x, g += C) {
    const AverageColumn column = columns[x];
    if (row_count == 1 && column.last == column.first + 1) {
      const T* __restrict grad = rows[0] + column.first * C;
      for (int64_t c = 0; c < C; ++c) g[c] = load(grad + c) * inverse;
      continue;
    }
    for (int64_t c = 0; c < C; ++c) g[c] = 0;
    for (int64_t r = 0; r < row_count; ++r) {
      for (int64_t o = column.first; o < column.last; ++o) {
        const T* __restrict grad = rows[r] + o * C;
        for (int64_t c = 0; c < C; ++c) g[c] += load(grad + c) * inverse;
      }
    }
  }
}

// Walks over pixels of x, seen as rows, in pieces whose gradients stay in cache.
template <class T>
class AverageGather {
  using A = acc_t<T>;
  const PoolShape shape;
  const T *grad, *x;
  const int64_t pitch, C = shape.channels, step = std::max<int64_t>(4, kPieceElements / C / 4 * 4);
  const A inverse = A(1) / static_cast<A>(shape.h.kernel * shape.w.kernel);
  std::vector<A> g = std::vector<A>(step * C);
  std::vector<const T*> rows;
  std::vector<AverageColumn> columns;

  static constexpr int64_t kPieceElements = 1024;

  // The rows of windows that cover row `y` of all rows of all images.
  void cover(int64_t y) {
    const int64_t sample = y / shape.h.size, i = y % shape.h.size;
    rows.clear();
    for (int64_t o = shape.h.first(i); o < shape.h.last(i); ++o) {
      rows.push_back(grad + (sample * shape.h.windows + o) * shape.w.windows * C);
    }
  }

 public:
  AverageGather(const PoolShape& s, const Tensor& grad_out, const Tensor& input)
      : shape(s), grad(data<T>(grad_out)), x(data<T>(input)), pitch(pixel_pitch(input)) {
    for (int64_t i = 0; i < shape.w.size; ++i) columns.push_back({shape.w.first(i), shape.w.last(i)});
  }

  // f(g, x, first, last) for the pieces of [begin, end); g is [last - first, C], rows of x lie `pitch` apart
  template <class F>
  void for_each_piece(int64_t begin, int64_t end, const F& f) {
    const int64_t width = shape.w.size;
    for (int64_t row = begin, known = -1; row < end;) {
      const int64_t y = row / width, at = row - y * width, stop = std::min({end, (y + 1) * width, row + step});
      if (y != known) cover(known = y);
      const int64_t row_count = static_cast<int64_t>(rows.size());
      spread_pixels(g.data(), rows.data(), row_count, &columns[at], stop - row, C, inverse);
      f(g.data(), x + row * pitch, row, stop);
      row = stop;
    }
  }
};

}  // namespace resnet_fused::cpu
