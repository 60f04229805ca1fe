// What the 1x1 convolutions of the CPU share: the levels' kernels by name, values applied on load into rows that the
// products of product.h read, and the sharing of units of work.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <cstring>

#include "panels.h"
#include "pixels.h"
#include "product.h"

namespace resnet_fused::cpu {

inline constexpr int64_t kGap = 16;  // after a row of whole cache lines: no rows a power of two apart

RESNET_FUSED_INLINE int64_t rounded_up(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }
RESNET_FUSED_INLINE int64_t pitch_of(int64_t channels) { return rounded_up(channels, Level512::panel) + kGap; }

// A scalar as a vector of one lane, so that the formulas below are written once for the last channels too.
RESNET_FUSED_INLINE void load_lanes(float& v, const float* p) { v = *p; }
RESNET_FUSED_INLINE void store_lanes(float* p, const float& v) { *p = v; }
template <class V>
RESNET_FUSED_INLINE void load_lanes(V& v, const float* p) {
  typedef V Anywhere __attribute__((aligned(4), may_alias));
  v = *reinterpret_cast<const Anywhere*>(p);
}
template <class V>
RESNET_FUSED_INLINE void store_lanes(float* p, const V& v) {
  typedef V Anywhere __attribute__((aligned(4), may_alias));
  *reinterpret_cast<Anywhere*>(p) = v;
}

inline constexpr int64_t kFloatsAhead = 768;  // of what is applied on load, fetched from memory

// x^ of lazy.py: x, or relu(scale*x + shift), at the pixels of a stride.
struct Activation {
  const float *x, *scale, *shift;  // [rows, C], [C]; the last two null: x itself
  int64_t C;
  Pixels pixels;
  int64_t gap = 0;  // between the channels of a pixel and those of the next: x is some channels of more

  int64_t pitch() const { return C + gap; }
};

// NaN and -0.0 pass.
template <class V>
RESNET_FUSED_INLINE void activate_lanes(float* out, const float* x, const float* scale, const float* shift) {
  V value, factor, term;
  load_lanes(value, x), load_lanes(factor, scale), load_lanes(term, shift);
  value = value * factor + term;
  const V zero = {};
  store_lanes(out, V(value < zero ? zero : value));
}

// Rows [row, row + rows) of channels [c, c + width) of x^; zeros up to whole panels.
template <class L>
RESNET_FUSED_INLINE void write_activation(const Activation& a, int64_t row, int64_t rows, int64_t c, int64_t width,
                                          float* out, int64_t pitch) {
  const int64_t vectors = width / L::lanes * L::lanes, padded = rounded_up(width, L::panel);
  for (int64_t r = 0; r < rows; ++r, out += pitch) {
    const float* x = a.x + a.pixels.source(row + r) * a.pitch() + c;
    if (a.scale) {
      for (int64_t i = 0; i < vectors; i += L::lanes) {
        activate_lanes<typename L::Vector>(out + i, x + i, a.scale + c + i, a.shift + c + i);
      }
      for (int64_t i = vectors; i < width; ++i) activate_lanes<float>(out + i, x + i, a.scale + c + i, a.shift + c + i);
    } else {
      for (int64_t i = 0; i < vectors; i += L::lanes) {
        typename L::Vector value;
        load_vector<L>(value, x + i);
        store_vector<L>(out + i, value);
      }
      for (int64_t i = vectors; i < width; ++i) out[i] = x[i];
    }
    for (int64_t i = width; i < padded; ++i) out[i] = 0;
  }
}

// The cache lines of rows in memory, one after the other.
struct RowLines {
  const char *next, *row_end, *end;
  int64_t gap, width;  // bytes between rows, and of a row

  RESNET_FUSED_INLINE RowLines(const float* first, int64_t floats) : RowLines(first, floats > 0, floats, floats) {}
  RESNET_FUSED_INLINE RowLines(const float* first, int64_t rows, int64_t floats, int64_t pitch) {
    constexpr int64_t size = sizeof(float);
    if (pitch == floats && rows > 0) floats *= rows, pitch = floats, rows = 1;
    next = reinterpret_cast<const char*>(first), gap = (pitch - floats) * size, width = floats * size;
    row_end = next + width, end = rows > 0 ? row_end + (rows - 1) * pitch * size : next;
  }

  RESNET_FUSED_INLINE int64_t count() const {
    return next < end ? (end - next + gap) / (width + gap) * ((width + 63) / 64) : 0;
  }
  RESNET_FUSED_INLINE void advance() {
    next += 64;
    if (next >= row_end && row_end < end) next = row_end + gap, row_end = next + width;
  }
};

// Lines that are to be read later, fetched a few at a time into the second-level cache between products.
struct Ahead {
  RowLines lines;
  int64_t step;  // of them at a time

  // `times`: how often it will be called.
  RESNET_FUSED_INLINE Ahead(const float* first, int64_t floats, int64_t times) : Ahead({first, floats}, times) {}
  RESNET_FUSED_INLINE Ahead(const RowLines& lines, int64_t times) : lines(lines), step(lines.count() / times + 1) {}

  RESNET_FUSED_INLINE void operator()() { fetch<0>(); }
  // `written`: 1 where they will be.
  template <int written>
  RESNET_FUSED_INLINE void fetch() {
    for (int64_t i = 0; i < step && lines.next < lines.end; ++i, lines.advance()) {
      __builtin_prefetch(lines.next, written, 2);
    }
  }
};

// packed[panel][depth][L::panel] = w[(first + column) * column_stride + k * depth_stride], zeros beyond the last
// column.
template <class L>
RESNET_FUSED_INLINE void pack_panel(const float* w, int64_t columns, int64_t column_stride, int64_t depth,
                                    int64_t depth_stride, float* packed) {
  constexpr int64_t kLines = 16;  // of depth at a time: a cache line of each column
  for (int64_t k = 0; k < depth; k += kLines) {
    const int64_t lines = std::min(kLines, depth - k);
    float* out = packed + k * L::panel;
    for (int64_t j = 0; j < L::panel; ++j) {
      const float* from = w + j * column_stride + k * depth_stride;
      for (int64_t i = 0; i < lines; ++i) out[i * L::panel + j] = j < columns ? from[i * depth_stride] : 0.0f;
    }
  }
}

// work(unit) for every unit, each by the thread that asks for it first; `make()` gives a thread its `work`.
template <class Make>
void share_units(int64_t units, const Make& make) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, units, 1, [&](int64_t, int64_t) {
    auto work = make();
    for (int64_t unit = next++; unit < units; unit = next++) work(unit);
  });
}

}  // namespace resnet_fused::cpu
