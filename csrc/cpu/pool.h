// Max pooling over channels_last images: where windows lie, and the gradient that each pixel gathers from the windows
// that cover it.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "alloc.h"
#include "rows.h"

namespace resnet_fused::cpu {

// Windows along the height or the width: window o covers positions [o*stride - padding, o*stride - padding + kernel).
struct PoolAxis {
  int64_t size, kernel, stride, padding, windows;

  PoolAxis(int64_t n, int64_t k, int64_t s, int64_t p)
      : size(n), kernel(k), stride(s), padding(p), windows((n + 2 * p - k) / s + 1) {}

  int64_t start(int64_t window) const { return window * stride - padding; }
  // Windows [first, last) that cover position i.
  int64_t first(int64_t i) const { return std::max<int64_t>(0, i + padding - kernel + stride) / stride; }
  int64_t last(int64_t i) const { return std::min(windows, (i + padding) / stride + 1); }
};

struct PoolShape {
  int64_t samples, channels;
  PoolAxis h, w;

  PoolShape(const Tensor& z, const std::vector<int64_t>& k, const std::vector<int64_t>& s,
            const std::vector<int64_t>& p)
      : samples(z.size(0)), channels(z.size(1)), h(z.size(2), k[0], s[0], p[0]), w(z.size(3), k[1], s[1], p[1]) {}

  Tensor empty_pooled(ScalarType dtype) const { return empty_images(samples, channels, h.windows, w.windows, dtype); }
};

// A window that covers a pixel: its gradient and index [C], and the pixel's place in it.
template <class T>
struct PoolTap {
  const T* grad;
  const uint8_t* index;
  uint8_t place;
};

// A row of windows that covers a row of pixels: gradient and index of its first window, and the place of its column 0.
template <class T>
struct PoolTapRow {
  const T* grad;
  const uint8_t* index;
  int64_t place;
};

// Windows [first, last) of such a row that cover a column of pixels, and its place in the first of them.
struct PoolColumn {
  int64_t first, last, place;
};

// g[c] = (more ? g[c] : 0) + sum of grad[c] over the taps whose index[c] is their place. A select: NaN stays out.
template <class T, bool more, class A, size_t... t>
RESNET_FUSED_INLINE void gather_taps(A* __restrict g, const PoolTap<T>* taps, int64_t C, std::index_sequence<t...>) {
  const T* const grad[] = {taps[t].grad...};
  const uint8_t* const index[] = {taps[t].index...};
  const uint8_t place[] = {taps[t].place...};
  for (int64_t c = 0; c < C; ++c) {
    const A value[] = {load(grad[t] + c)...};
    const A sum = (... + (index[t][c] == place[t] ? value[t] : A(0)));
    g[c] = more ? g[c] + sum : sum;
  }
}

template <class T, int count, class A>
RESNET_FUSED_INLINE void gather_taps(A* __restrict g, const PoolTap<T>* taps, bool more, int64_t C) {
  const auto each = std::make_index_sequence<count>();
  more ? gather_taps<T, true>(g, taps, C, each) : gather_taps<T, false>(g, taps, C, each);
}

// g of `pixels` pixels from column x on, [pixels, C], before the ReLU's mask. Meanwhile their z is fetched.
template <class T, class A = acc_t<T>>
RESNET_FUSED_CLONES void gather_pixels(A* g, const T* z, const PoolTapRow<T>* rows, int64_t row_count,
                                       const PoolColumn* columns, int64_t stride, int64_t pixels, int64_t C) {
  PoolTap<T> taps[4];
  for (int64_t x = 0; x < pixels; ++x, g += C, z += C) {
    for (int64_t c = 0; c < C; c += 64 / sizeof(T)) __builtin_prefetch(z + c);
    const PoolColumn column = columns[x];
    int count = 0;
    bool more = false;
    for (int64_t r = 0; r < row_count; ++r) {
      int64_t place = rows[r].place + column.place, at = column.first * C;
      for (int64_t o = column.first; o < column.last; ++o, place -= stride, at += C) {
        taps[count] = {rows[r].grad + at, rows[r].index + at, static_cast<uint8_t>(place)};
        if (++count < 4) continue;
        gather_taps<T, 4>(g, taps, more, C);
        more = true;
        count = 0;
      }
    }
    switch (count) {
      case 0:
        for (int64_t c = 0; !more && c < C; ++c) g[c] = 0;
        break;
      case 1: gather_taps<T, 1>(g, taps, more, C); break;
      case 2: gather_taps<T, 2>(g, taps, more, C); break;
      default: gather_taps<T, 3>(g, taps, more, C);
    }
  }
}

// Walks over pixels of z, seen as rows of C, in pieces whose gathered gradients stay in cache.
template <class T>
class PoolGather {
  using A = acc_t<T>;
  const PoolShape shape;
  const T *grad, *z;
  const uint8_t* index;
  const int64_t C = shape.channels, step = std::max<int64_t>(4, kPieceElements / C / 4 * 4);
  std::vector<A> g = std::vector<A>(step * C);
  std::vector<PoolTapRow<T>> rows;
  std::vector<PoolColumn> columns;

  static constexpr int64_t kPieceElements = 1024;

  // The rows of windows that cover row `y` of all rows of all images.
  void cover(int64_t y) {
    const int64_t sample = y / shape.h.size, i = y % shape.h.size;
    rows.clear();
    for (int64_t o = shape.h.first(i); o < shape.h.last(i); ++o) {
      const int64_t offset = (sample * shape.h.windows + o) * shape.w.windows * C;
      rows.push_back({grad + offset, index + offset, (i - shape.h.start(o)) * shape.w.kernel});
    }
  }

 public:
  PoolGather(const PoolShape& s, const Tensor& grad_out, const Tensor& indices, const Tensor& input)
      : shape(s), grad(data<T>(grad_out)), z(data<T>(input)), index(data<uint8_t>(indices)) {
    const PoolAxis& w = shape.w;
    for (int64_t x = 0; x < w.size; ++x) columns.push_back({w.first(x), w.last(x), x - w.start(w.first(x))});
  }

  // f(g, z, first, last) for the pieces of [begin, end); g and z are [last - first, C]
  template <class F>
  void for_each_piece(int64_t begin, int64_t end, const F& f) {
    const int64_t width = shape.w.size;
    for (int64_t row = begin, known = -1; row < end;) {
      const int64_t y = row / width, x = row - y * width, stop = std::min({end, (y + 1) * width, row + step});
      if (y != known) cover(known = y);
      const int64_t row_count = static_cast<int64_t>(rows.size());
      gather_pixels(g.data(), z + row * C, rows.data(), row_count, &columns[x], shape.w.stride, stop - row, C);
      f(g.data(), z + row * C, row, stop);
      row = stop;
    }
  }
};

}  // namespace resnet_fused::cpu
