// What follows the products of Winograd's filtering: the output's transform with what is done to an output before it is
// written, and the sums of batch statistics while the outputs are in cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "winograd.h"
#include "winograd_problem.h"

namespace resnet_fused::cpu {

// Sums of a block's outputs, per channel, for statistics: see block_moments in moments.h. Null: not asked for.
struct Sums {
  float *pivot = nullptr, *sum = nullptr, *square = nullptr;  // of one block
};

// Outputs are written as they are, and kept for the sums.
struct Plain {
  static constexpr bool kept = true;
  template <class L>
  RESNET_FUSED_INLINE void apply(typename L::Vector&, int64_t, const float*, int64_t) const {}
};

// Outputs are shifted, added to and clamped.
struct Epilogue {
  static constexpr bool kept = false;
  const float* shift;     // of whole panels
  const float* residual;  // as z, or null
  const float* z;
  bool relu;
  int64_t ahead;  // how far behind a pixel of the residual that of a later tile lies

  // `target`: where `count` values of y, from channel k on, will be.
  template <class L>
  RESNET_FUSED_INLINE void apply(typename L::Vector& y, int64_t k, const float* target, int64_t count) const {
    typename L::Vector other;
    load_vector<L>(other, shift + k);
    y += other;
    if (residual) {
      const float* from = residual + (target - z);
      __builtin_prefetch(from + ahead);
      if (count >= L::lanes) {
        load_vector<L>(other, from);
      } else {
        other = typename L::Vector{};
        for (int64_t lane = 0; lane < count; ++lane) other[lane] = from[lane];
      }
      y += other;
    }
    if (relu) y = y < 0.0f ? typename L::Vector{} : y;  // NaN stays
  }
};

// Write the outputs of a tile; `m` has its values of a panel, whose first outputs * outputs planes get the outputs too
// where they are kept. bad stays 0 while all outputs are finite.
template <class L, class F, class E>
RESNET_FUSED_INLINE void write_tile(const Problem& p, const E& epilogue, const Tile<F::outputs>& tile, int64_t k,
                                    float* m, int64_t plane, typename L::Vector& bad) {
  const int64_t channels = std::min(L::panel, p.K - k), rows = tile.rows(p), columns = tile.columns(p);
  float* first = p.z + ((tile.sample * p.P + tile.row) * p.Q + tile.column) * p.K + k;
  for (int64_t c = 0; c < channels; c += L::lanes) {
    typename L::Vector y[F::outputs][F::outputs];
    transform_output<L, F>(y, m + c, plane);
#pragma GCC unroll 4
    for (int64_t i = 0; i < F::outputs; ++i) {
#pragma GCC unroll 4
      for (int64_t j = 0; j < F::outputs; ++j) {
        if (i >= rows || j >= columns) continue;  // of which not all sums were made
        bad += y[i][j] * 0.0f;
        if constexpr (E::kept) store_vector<L>(m + (i * F::outputs + j) * plane + c, y[i][j]);
        float* target = first + (i * p.Q + j) * p.K + c;
        __builtin_prefetch(target + kAhead * 2 * p.K, 1);
        epilogue.template apply<L>(y[i][j], k + c, target, channels - c);
        if (channels - c >= L::lanes) {
          store_vector<L>(target, y[i][j]);
        } else {
          for (int64_t lane = 0; lane < channels - c; ++lane) target[lane] = y[i][j][lane];
        }
      }
    }
  }
}

// total = the sum of `count` vectors, pair by pair; count is a power of two.
template <int64_t count, class V>
RESNET_FUSED_INLINE void add_up(V& total, const V* parts) {
  if constexpr (count == 1) {
    total = parts[0];
  } else {
    V other;
    add_up<count / 2>(total, parts);
    add_up<count / 2>(other, parts + count / 2);
    total += other;
  }
}

// Sums over the outputs of the tiles [first, first + count) for one vector of channels; m as write_tile
// leaves it. The mean is found first, from differences to the first output, then everything is summed about it.
template <class L, class F>
RESNET_FUSED_INLINE void sum_vector(const Problem& p, int64_t first, int64_t count, const float* m, int64_t plane,
                                    float* pivot, float* sum, float* square) {
  using V = typename L::Vector;
  constexpr int64_t kOutputs = F::outputs * F::outputs;
  V about, totals[kOutputs] = {}, squares[kOutputs] = {};
  load_vector<L>(about, m);
  int64_t outputs = 0;
  for (int64_t pass = 0; pass < 2; ++pass) {
    Tile<F::outputs> tile(p, first);
    for (int64_t t = 0; t < count; ++t, tile.advance(p)) {
      const int64_t rows = tile.rows(p), columns = tile.columns(p);
      const float* values = m + t * p.m_pitch();
#pragma GCC unroll 16
      for (int64_t i = 0; i < kOutputs; ++i) {
        if (i / F::outputs >= rows || i % F::outputs >= columns) continue;
        V value;
        load_vector<L>(value, values + i * plane);
        const V difference = value - about;
        totals[i] += difference;
        squares[i] += difference * difference;
      }
      outputs += rows * columns;
    }
    if (pass == 0) {
      V total;
      add_up<kOutputs>(total, totals);
      about += total * (1.0f / static_cast<float>(outputs));
      for (int64_t i = 0; i < kOutputs; ++i) totals[i] = squares[i] = V{};
    }
  }
  store_vector<L>(pivot, about);
  V total;
  add_up<kOutputs>(total, totals);
  store_vector<L>(sum, total);
  add_up<kOutputs>(total, squares);
  store_vector<L>(square, total);
}

// Rows of a panel that are multiplied by next, `pitch` apart: a line of them is fetched at every so many steps of a
// product.
template <class L, int64_t pitch>
struct FetchNext {
  static constexpr int64_t kBetween = L::panel >= pitch ? kLine : pitch;  // lines
  const float* next;
  int64_t every, wait = every;

  // `next`: null where there are none.
  RESNET_FUSED_INLINE FetchNext(const float* next, int64_t rows, int64_t steps)
      : next(next), every(next ? std::max<int64_t>(1, steps / lines(rows)) : std::numeric_limits<int64_t>::max()) {}

  static constexpr int64_t lines(int64_t rows) { return std::max<int64_t>(1, rows * pitch / kBetween); }

  RESNET_FUSED_INLINE void operator()() {
    wait -= L::apart;
    for (; wait <= 0; wait += every, next += kBetween) __builtin_prefetch(next, 0, 2);
  }
};

// The first of a sum's values, and how many it has.
template <class F>
constexpr int64_t first_value(int64_t sum) {
  return F::place(F::first(sum / F::sums), F::first(sum % F::sums));
}
template <class F>
constexpr int64_t depth_of(int64_t sum) {
  return F::depth(sum / F::sums) * F::depth(sum % F::sums);
}

// m[sum][tile] of sum i in the one and j in the other direction = the products of a block's values with a panel of the
// weight, whose rows are `u_pitch` apart. What the last makes goes to the second outputs alone: it is left out of tiles
// that have none. With `fetches` a line of the weight that comes next, `next_depth` rows at `next` or null, is fetched
// at a time meanwhile.
template <class L, class F, int64_t u_pitch, bool fetches>
RESNET_FUSED_INLINE void multiply_sum(const Problem& p, int64_t block, int64_t sum, const float* v, const float* u,
                                      float* m, const float* next, int64_t next_depth) {
  constexpr int64_t last = F::sums - 1;
  const int64_t i = sum / F::sums, j = sum % F::sums, count = p.size(block), first = first_value<F>(sum);
  const Problem::Range tiles = p.with(i == last, j == last, block);
  const int64_t depth = depth_of<F>(sum) * p.C, pitch = F::stride == 1 ? p.v_pitch() : depth + p.kGap;
  v += count * (F::stride == 1 ? sum * pitch : first * p.C + sum * p.kGap) + tiles.begin * pitch;
  m += sum * p.m_plane(count) + tiles.begin * p.m_pitch();
  u += first * p.u_plane();
  const int64_t wanted = tiles.end - tiles.begin;
  if constexpr (fetches) {
    FetchNext<L, u_pitch> fetch(next, next_depth, (wanted + L::rows - 1) / L::rows * depth);
    multiply_rows<L, u_pitch>(wanted, v, pitch, u, depth, m, p.m_pitch(), Nothing{}, fetch);
  } else {
    multiply_rows<L, u_pitch>(wanted, v, pitch, u, depth, m, p.m_pitch());
  }
}

// The tiles `tiles` of a block, in a panel, from the sums. Returns whether all are finite before the epilogue.
template <class L, class F, class E>
RESNET_FUSED_INLINE bool write_tiles(const Problem& p, int64_t block, int64_t panel, Problem::Range tiles, float* m,
                                     const E& epilogue) {
  const int64_t plane = p.m_plane(p.size(block));
  typename L::Vector bad = {};
  Tile<F::outputs> tile(p, p.first_tile(block) + tiles.begin);
  for (int64_t t = tiles.begin; t < tiles.end; ++t, tile.advance(p)) {
    write_tile<L, F>(p, epilogue, tile, panel * L::panel, m + t * p.m_pitch(), plane, bad);
  }
  float lanes[L::lanes];
  store_vector<L>(lanes, bad);
  return std::all_of(lanes, lanes + L::lanes, [](float lane) { return lane == 0; });
}

// The outputs of a block in a panel, from the transformed input and weight; `m` is room for m_size values, `next` the
// weight's panel that comes next, or null. Returns whether all are finite before the epilogue.
template <class L, class F, int64_t u_pitch, class E>
RESNET_FUSED_INLINE bool write_outputs(const Problem& p, int64_t block, int64_t panel, const float* v, const float* u,
                                       float* m, const Sums& sums, const E& epilogue, const float* next) {
  const int64_t first = p.first_tile(block), count = p.size(block), k = panel * L::panel;
  const int64_t plane = p.m_plane(count);
  constexpr int64_t kSums = F::sums * F::sums;
  for (int64_t sum = 0; sum < kSums; ++sum) {
    const int64_t then = (sum + 1) % kSums;
    const float* from = then ? u + first_value<F>(then) * p.u_plane() : next;
    multiply_sum<L, F, u_pitch, !L::fetches>(p, block, sum, v, u, m, from, depth_of<F>(then) * p.C);
  }
  const bool finite = write_tiles<L, F>(p, block, panel, {0, count}, m, epilogue);
  if (sums.pivot) {
    for (int64_t c = 0; c < L::panel; c += L::lanes) {
      sum_vector<L, F>(p, first, count, m + c, plane, sums.pivot + k + c, sums.sum + k + c, sums.square + k + c);
    }
  }
  return finite;
}

}  // namespace resnet_fused::cpu
