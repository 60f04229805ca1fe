// Both gradients of a 1x1 convolution from one read of its lazy gradient, a tile of rows at a time.
#pragma once

#include "conv1x1_finish.h"

namespace resnet_fused::cpu {

// Lines that are to be read later.
struct Lines : RowLines {
  using RowLines::RowLines;

  RESNET_FUSED_INLINE bool done() const { return next + 64 >= end; }

  // One of them, between multiplications: more at a time would wait for each other. At the end the last again, since a
  // line beyond, of no page, would cost a search of the page tables each time.
  RESNET_FUSED_INLINE void operator()() {
    __builtin_prefetch(next);
    if (!done()) advance();
  }
};

// Several one after the other: of the gradient, z, x and the residual. The first is of memory, even if it is empty.
struct Fetch {
  Lines now, later[3];
  int64_t left = 3;

  RESNET_FUSED_INLINE void choose() {
    for (; now.done() && left > 0; --left) {
      if (later[3 - left].next < later[3 - left].end) now = later[3 - left];
    }
  }
};

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

  // Of rows that will be written here, and of the residual for a part of grad_x.
  RESNET_FUSED_INLINE Fetch fetch(int64_t row, int64_t rows, int64_t part_row) const {
    const bool reads_x = p.reads_input() && p.input.pixels.dense();
    const bool adds = p.grad_x && p.added.residual && p.added.dense();
    const int64_t added = adds ? std::clamp(p.rows - part_row, int64_t(0), p.part()) : 0;
    return {{p.gradient.g + std::min(row, p.rows - 1) * p.K, rows * p.K},
            {{p.gradient.z + row * p.K, p.gradient.reads_z() ? rows * p.K : 0},
             {p.input.x + row * p.input.pitch() + c, reads_x ? rows : 0, width, p.input.pitch()},
             {p.added.residual + part_row * (p.C + p.added.gap) + c, added, width, p.C + p.added.gap}}};
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
  Fetch ahead = t.fetch(next, later, row);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t k = p.K * block / blocks, outputs = p.K * (block + 1) / blocks - k;
    for (int64_t panel = t.first; panel < t.end; ++panel) {
      multiply_columns<L>(
          outputs, t.dz + k, t.dz_pitch, t.activation + (panel - t.first) * L::panel, t.pitch, rows, add,
          t.sums.weight + (panel * p.K + k) * L::panel, [&] { ahead.choose(); }, ahead.now);
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
  int64_t asked = p.stream ? rows : 0;  // rows of grad_x, before those are multiplied that will be written there
  const auto between = [&] __attribute__((always_inline)) {
    for (const int64_t stop = std::min(rows, asked + L::rows); asked < stop; ++asked) {
      for (int64_t j = 0; j < columns; j += 16) __builtin_prefetch(p.grad_x + (row + asked) * p.pitch() + c + j, 1);
    }
    ahead.choose();
  };
  if (p.packed) {
    multiply_rows<L>(rows, dz, t.dz_pitch, p.packed + panel * p.K * L::panel, p.K, y, L::panel, between, ahead.now);
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < columns; ++j) y[r * L::panel + j] = dz[r * t.dz_pitch + c + j];
    }
  }
  if (p.coupling) {
    multiply_rows<L>(
        rows, activation, t.pitch, p.coupled + panel * p.C * L::panel, p.C, more, L::panel, [&] { ahead.choose(); },
        ahead.now);
  }
  const auto finish = [&]<class V>(int64_t j, const V*) __attribute__((always_inline)) {
    if (p.coupling || p.constant) add_terms<V>(p, y + j, more + j, rows, c + j);
    if (p.through && p.added.residual) {
      finish_through<V, true>(p, y + j, activation + c - t.c + j, t.pitch, row, rows, c + j, t.sums);
    } else if (p.through) {
      finish_through<V, false>(p, y + j, activation + c - t.c + j, t.pitch, row, rows, c + j, t.sums);
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
      const int64_t count = std::min(part, rows - begin);
      const int64_t until = std::max(fetched, std::min(later, begin + 2 * part));
      input_rows<L>(t, row + begin, count, begin, t.fetch(next + fetched, until - fetched, row + begin + part));
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
