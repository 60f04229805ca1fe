// Both gradients of a 1x1 convolution from one read of its lazy gradient, a tile of rows at a time.
#pragma once

#include "conv1x1_gradient.h"

namespace resnet_fused::cpu {

// What is added to the input's gradient from another path: the pixels [::stride, ::stride] of it.
struct Added {
  const float* residual;  // [rows of it, C] or null
  const uint8_t* mask;    // or null
  int64_t H, W, stride_h, stride_w;

  bool dense() const { return stride_h == 1 && stride_w == 1; }

  // The row of the residual that belongs to a row of the gradient, or -1.
  RESNET_FUSED_INLINE int64_t source(int64_t row) const {
    const int64_t line = row / W, w = row - line * W, sample = line / H, h = line - sample * H;
    if (h % stride_h || w % stride_w) return -1;
    const int64_t height = (H + stride_h - 1) / stride_h, width = (W + stride_w - 1) / stride_w;
    return (sample * height + h / stride_h) * width + w / stride_w;
  }
};

struct Conv1x1Backward {
  Gradient gradient;
  Activation input;                 // x null where nothing needs it
  const float *weight, *packed;     // [K, C], [panels][K][panel]; null: dz itself is the product
  const float *coupling, *coupled;  // [C, C], [panels][C][panel], or null
  const float *constant, *mean;     // [C] or null
  Added added;
  float* grad_x;  // [rows, C] or null
  bool through;   // grad_x is to go through the ReLU of a lazy input, and its sums are wanted
  bool weight_grad, sum_dz;
  bool stream;  // grad_x past the caches
  int64_t rows, K, C, panel, panels;

  static constexpr int64_t kPart = 28, kMost = 4;  // rows that are written at a time; so often at most in a tile
  // Rows of a product of the input's gradient: a few, whose dz stays in the first-level cache, but where the weight
  // fills the second-level one, all of a tile, which then reads it once.
  int64_t part() const { return K * C > (int64_t(96) << 10) ? tile() : kPart; }

  // Rows of a tile: many, where each adds to all sums of the weight's gradient, but within the second-level cache.
  int64_t tile() const {
    constexpr int64_t kFloats = int64_t(160) << 10;
    return std::clamp(kFloats / (pitch_of(K) + pitch_of(C)) / kPart, int64_t(1), weight_grad ? kMost : 1) * kPart;
  }
  bool reads_input() const { return weight_grad || coupling || through; }
  int64_t scratch() const { return tile() * (pitch_of(K) + pitch_of(C)) + 2 * part() * panel; }
};

// Lines that are to be read later, a few at a time between products: into the first-level cache, since processors drop
// what is asked for the second alone.
struct Lines {
  const char *next, *end;
  int64_t step;  // bytes at a time

  // `calls`: how often it will be called.
  RESNET_FUSED_INLINE Lines(const void* first, int64_t bytes, int64_t calls)
      : next(static_cast<const char*>(first)), end(next + bytes), step(rounded_up(bytes / calls + 1, 64)) {}

  RESNET_FUSED_INLINE void operator()() {
    for (const char* stop = std::min(end, next + step); next < stop; next += 64) __builtin_prefetch(next);
  }
};

// Several at once: of the gradient, z, x and the residual.
struct Fetch {
  Lines g, z, x, residual;

  RESNET_FUSED_INLINE void operator()() { g(), z(), x(), residual(); }
};

// What a unit of work sums: [panels of all channels][K][panel], [C] each and [K].
struct BackwardSums {
  float* weight = nullptr;
  double *sum_g = nullptr, *sum_gx = nullptr, *sum_dz = nullptr;
};

// The panel's rows of y, from where they are summed, to grad_x; the columns [c, c + lanes of V), column j of y.
template <class V>
RESNET_FUSED_INLINE void finish_through(const Conv1x1Backward& p, const float* y, const float* activation,
                                        int64_t pitch, int64_t row, int64_t rows, int64_t c, const BackwardSums& sums) {
  V mean, total = {}, product = {}, value, x;
  const V zero = {};
  load_lanes(mean, p.mean + c);
  for (int64_t r = 0; r < rows; ++r) {
    load_lanes(value, y + r * p.panel), load_lanes(x, activation + r * pitch);
    value = x <= zero ? zero : value;
    load_lanes(x, p.input.x + p.input.pixels.source(row + r) * p.C + c);
    store_lanes(p.grad_x + (row + r) * p.C + c, value);
    total += value, product += value * (x - mean);
  }
  constexpr int64_t lanes = sizeof(V) / sizeof(float);
  float found[2][lanes];
  store_lanes(found[0], total), store_lanes(found[1], product);
  for (int64_t i = 0; i < lanes; ++i) sums.sum_g[c + i] += found[0][i], sums.sum_gx[c + i] += found[1][i];
}

// Past the caches, which an output larger than they are would only empty: no line is read before it is written.
template <class V>
RESNET_FUSED_INLINE void stream_lanes(float* p, const V& v) {
#ifdef RESNET_FUSED_LEVEL_512
  if constexpr (sizeof(V) == 64) {
    asm("vmovntps %1, %0" : "=m"(*reinterpret_cast<V*>(p)) : "v"(v));
    return;
  }
#endif
  store_lanes(p, v);
}

// `sources`: of every row that of the residual, or -1; null: the same rows.
template <class V, bool stream>
RESNET_FUSED_INLINE void finish_added(const Conv1x1Backward& p, const float* y, const int64_t* sources, int64_t row,
                                      int64_t rows, int64_t c) {
  for (int64_t r = 0; r < rows; ++r) {
    V value, other;
    load_lanes(value, y + r * p.panel);
    const int64_t from = !p.added.residual ? -1 : sources ? sources[r] : row + r;
    if (from >= 0) {
      load_lanes(other, p.added.residual + from * p.C + c);
      if (p.added.mask) mask_lanes(other, p.added.mask + from * mask_bytes(p.C), c);
      value += other;
    }
    if constexpr (stream) {
      stream_lanes(p.grad_x + (row + r) * p.C + c, value);
    } else {
      store_lanes(p.grad_x + (row + r) * p.C + c, value);
    }
  }
}

template <class V>
RESNET_FUSED_INLINE void add_terms(const Conv1x1Backward& p, float* y, const float* more, int64_t rows, int64_t c) {
  V constant = {}, value, other;
  if (p.constant) load_lanes(constant, p.constant + c);
  for (int64_t r = 0; r < rows; ++r) {
    load_lanes(value, y + r * p.panel);
    if (p.coupling) load_lanes(other, more + r * p.panel), value += other;
    store_lanes(y + r * p.panel, V(value + constant));
  }
}

// Adds the sums of the columns.
template <class L>
RESNET_FUSED_INLINE void sum_rows(const float* dz, int64_t pitch, int64_t rows, int64_t K, double* sums) {
  const auto add = [&]<class V>(int64_t k, const V*) __attribute__((always_inline)) {
    V sum = {}, value;
    for (int64_t r = 0; r < rows; ++r) load_lanes(value, dz + r * pitch + k), sum += value;
    constexpr int64_t lanes = sizeof(V) / sizeof(float);
    float found[lanes];
    store_lanes(found, sum);
    for (int64_t i = 0; i < lanes; ++i) sums[k + i] += found[i];
  };
  const int64_t vectors = K / L::lanes * L::lanes;
  for (int64_t k = 0; k < vectors; k += L::lanes) add(k, static_cast<const typename L::Vector*>(nullptr));
  for (int64_t k = vectors; k < K; ++k) add(k, static_cast<const float*>(nullptr));
}

// What works on a range of rows for the panels [first, end) of channels: a tile's rows of dz and x^, and sums.
struct Rows {
  const Conv1x1Backward& p;
  int64_t first, end, c, width, dz_pitch, pitch;
  float *dz, *activation, *y;
  BackwardSums sums;

  RESNET_FUSED_INLINE Rows(const Conv1x1Backward& p, int64_t first, int64_t end, int64_t panel, float* scratch,
                           const BackwardSums& sums)
      : p(p),
        first(first),
        end(end),
        c(first * panel),
        width(std::min(p.C, end * panel) - c),
        dz_pitch(pitch_of(p.K)),
        pitch(pitch_of(p.C)),
        dz(scratch),
        activation(dz + p.tile() * dz_pitch),
        y(activation + p.tile() * pitch),
        sums(sums) {}

  // Of rows that will be written here, and of the residual for a part of grad_x; in so many calls.
  RESNET_FUSED_INLINE Fetch fetch(int64_t row, int64_t rows, int64_t part_row, int64_t calls) const {
    constexpr int64_t size = sizeof(float);
    const bool reads_x = p.reads_input() && p.input.pixels.dense();
    const bool adds = p.grad_x && p.added.residual && p.added.dense();
    const int64_t added = adds ? std::clamp(p.rows - part_row, int64_t(0), p.part()) : 0;
    return {{p.gradient.g + row * p.K, rows * p.K * size, calls},
            {p.gradient.z + row * p.K, p.gradient.reads_z() ? rows * p.K * size : 0, calls},
            {p.input.x + row * p.C, reads_x ? rows * p.C * size : 0, calls},
            {p.added.residual + part_row * p.C, added * p.C * size, calls}};
  }
};

// dz and x^ of `rows` rows, from `at` of the tile on, and the sums of dz.
template <class L>
RESNET_FUSED_INLINE void write_rows(const Rows& t, int64_t row, int64_t rows, int64_t at) {
  const Conv1x1Backward& p = t.p;
  for (int64_t begin = 0; begin < rows; begin += Conv1x1Backward::kPart) {
    const int64_t count = std::min(Conv1x1Backward::kPart, rows - begin);
    float* dz = t.dz + (at + begin) * t.dz_pitch;
    write_gradient<L>(p.gradient, row + begin, count, dz, t.dz_pitch);
    if (t.sums.sum_dz) sum_rows<L>(dz, t.dz_pitch, count, p.K, t.sums.sum_dz);
  }
  if (p.reads_input()) write_activation<L>(p.input, row, rows, t.c, t.width, t.activation + at * t.pitch, t.pitch);
}

// The sums of the weight's gradient over a tile's rows, by blocks of outputs whose gradients stay in the first cache.
// `add`: to what they hold already. Meanwhile `later` rows from `next` on are fetched.
template <class L>
RESNET_FUSED_INLINE void add_to_weight(const Rows& t, int64_t row, int64_t rows, bool add, int64_t next,
                                       int64_t later) {
  const Conv1x1Backward& p = t.p;
  const int64_t blocks = (p.K + 4 * L::rows - 1) / (4 * L::rows);
  const int64_t groups = (p.K / blocks + L::rows - 1) / L::rows;  // of a block, at least
  Fetch ahead = t.fetch(next, later, row, (t.end - t.first) * blocks * groups);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t k = p.K * block / blocks, outputs = p.K * (block + 1) / blocks - k;
    for (int64_t panel = t.first; panel < t.end; ++panel) {
      multiply_columns<L>(outputs, t.dz + k, t.dz_pitch, t.activation + (panel - t.first) * L::panel, t.pitch, rows,
                          add, t.sums.weight + (panel * p.K + k) * L::panel, ahead);
    }
  }
}

// A panel of the input's gradient for the rows from `at` of the tile on, whose dz and x^ are in the cache.
template <class L>
RESNET_FUSED_INLINE void input_panel(const Rows& t, int64_t panel, int64_t row, int64_t rows, int64_t at,
                                     const int64_t* sources, Fetch& ahead) {
  const Conv1x1Backward& p = t.p;
  const int64_t c = panel * L::panel, columns = std::min(L::panel, p.C - c), vectors = columns / L::lanes * L::lanes;
  const float *dz = t.dz + at * t.dz_pitch, *activation = t.activation + at * t.pitch;
  float *y = t.y, *more = y + p.part() * L::panel;
  for (int64_t r = 0; r < rows && !p.stream; ++r) {
    for (int64_t j = 0; j < columns; j += 16) __builtin_prefetch(p.grad_x + (row + r) * p.C + c + j, 1);
  }
  if (p.packed) {
    multiply_rows<L>(rows, dz, t.dz_pitch, p.packed + panel * p.K * L::panel, L::panel, p.K, y, L::panel, ahead);
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < columns; ++j) y[r * L::panel + j] = dz[r * t.dz_pitch + c + j];
    }
  }
  if (p.coupling) {
    multiply_rows<L>(rows, activation, t.pitch, p.coupled + panel * p.C * L::panel, L::panel, p.C, more, L::panel);
  }
  const auto finish = [&]<class V>(int64_t j, const V*) __attribute__((always_inline)) {
    if (p.coupling || p.constant) add_terms<V>(p, y + j, more + j, rows, c + j);
    if (p.through) {
      finish_through<V>(p, y + j, activation + c - t.c + j, t.pitch, row, rows, c + j, t.sums);
    } else if (p.stream) {
      finish_added<V, true>(p, y + j, sources, row, rows, c + j);
    } else {
      finish_added<V, false>(p, y + j, sources, row, rows, c + j);
    }
  };
  for (int64_t j = 0; j < vectors; j += L::lanes) finish(j, static_cast<const typename L::Vector*>(nullptr));
  for (int64_t j = vectors; j < columns; ++j) finish(j, static_cast<const float*>(nullptr));
}

// The input's gradient for rows of a tile from `at` on.
template <class L>
RESNET_FUSED_INLINE void input_rows(const Rows& t, int64_t row, int64_t rows, int64_t at, Fetch ahead) {
  int64_t sources[Conv1x1Backward::kMost * Conv1x1Backward::kPart];
  const Added& added = t.p.added;
  const bool strided = added.residual && !added.dense();
  for (int64_t r = 0; r < rows && strided; ++r) sources[r] = added.source(row + r);
  for (int64_t panel = t.first; panel < t.end; ++panel) {
    input_panel<L>(t, panel, row, rows, at, strided ? sources : nullptr, ahead);
  }
}

// The rows [start, stop), a tile at a time, for the panels [first, end) of channels. A tile's rows make place for those
// of the next as soon as their part of the input's gradient is done: they were fetched meanwhile.
template <class L>
RESNET_FUSED_INLINE void backward_rows(const Conv1x1Backward& p, int64_t start, int64_t stop, int64_t first,
                                       int64_t end, float* scratch, const BackwardSums& sums) {
  constexpr int64_t kFloats = int64_t(64) << 10;  // more would displace what is at work
  const Rows t(p, first, end, L::panel, scratch, sums);
  const int64_t tile = p.tile(), part = p.part();
  const int64_t read = p.K * (p.gradient.reads_z() ? 2 : 1) + (p.reads_input() ? t.width : 0);
  write_rows<L>(t, start, std::min(tile, stop - start), 0);
  for (int64_t row = start; row < stop; row += tile) {
    const int64_t rows = std::min(tile, stop - row), next = row + rows, later = std::min(tile, stop - next);
    int64_t fetched = 0;
    if (p.weight_grad) {
      fetched = p.grad_x ? std::min(later, kFloats / read) : later;
      add_to_weight<L>(t, row, rows, row > start, next, fetched);
    }
    if (!p.grad_x) write_rows<L>(t, next, later, 0);
    for (int64_t begin = 0; begin < rows && p.grad_x; begin += part) {
      const int64_t count = std::min(part, rows - begin), groups = (count + L::rows - 1) / L::rows;
      const int64_t until = std::max(fetched, std::min(later, begin + 2 * part));
      input_rows<L>(t, row + begin, count, begin,
                    t.fetch(next + fetched, until - fetched, row + begin + part, (end - first) * groups));
      fetched = until;
      if (begin < later) write_rows<L>(t, next + begin, std::min(part, later - begin), begin);
    }
  }
#ifdef RESNET_FUSED_LEVEL_512
  if (p.stream) __builtin_ia32_sfence();  // before others read
#endif
}

// packed[depth][L::panel] = the first columns of rows `pitch` apart, zeros beyond them.
template <class L>
RESNET_FUSED_INLINE void pack_columns(const float* w, int64_t columns, int64_t depth, int64_t pitch, float* packed) {
  for (int64_t k = 0; k < depth; ++k, w += pitch, packed += L::panel) {
    if (columns == L::panel) {
      for (int64_t j = 0; j < L::panel; ++j) packed[j] = w[j];
    } else {
      for (int64_t j = 0; j < L::panel; ++j) packed[j] = j < columns ? w[j] : 0.0f;
    }
  }
}

template <class L>
RESNET_FUSED_INLINE void pack_inputs(const Conv1x1Backward& p, int64_t panel, float* packed, float* coupled) {
  const int64_t c = panel * L::panel, columns = std::min(L::panel, p.C - c);
  if (p.weight) pack_columns<L>(p.weight + c, columns, p.K, p.C, packed);
  if (p.coupling) pack_columns<L>(p.coupling + c, columns, p.C, p.C, coupled);
}

}  // namespace resnet_fused::cpu
