// Register-blocked products of rows with a packed panel of columns: what convolutions are made of.
//
// A level names the vectors of a machine and how many rows of sums, two vectors wide, its registers hold beside the two
// of the panel at work and a broadcast value: enough sums in flight to hide the latency of FMA. `steps` of a sum are
// unrolled, and what else is to be done meanwhile is done at every `apart`-th.
//
// Where registers are 16, twelve FMAs come with eight loads, and every further instruction shows where a core works for
// another thread too and gives each of them half its width. The panel lies one line after the other, which the hardware
// sees by itself, so only wider vectors `fetch` it ahead.
#pragma once

#include <cstdint>

#include "simd.h"

namespace resnet_fused::cpu {

inline constexpr int64_t kVectors = 2;  // of a panel's row
inline constexpr int64_t kLine = 16;    // floats of a cache line

struct Level512 {
  typedef float Vector __attribute__((vector_size(64)));
  typedef float Anywhere __attribute__((vector_size(64), aligned(4), may_alias));
  static constexpr int64_t lanes = 16, panel = lanes * kVectors, rows = 14, steps = 1, apart = 1;
  static constexpr bool fetches = true;
};
struct Level256 {
  typedef float Vector __attribute__((vector_size(32)));
  typedef float Anywhere __attribute__((vector_size(32), aligned(4), may_alias));
  static constexpr int64_t lanes = 8, panel = lanes * kVectors, rows = 6, steps = 8, apart = 4;
  static constexpr bool fetches = false;
};
struct Level128 {
  typedef float Vector __attribute__((vector_size(16)));
  typedef float Anywhere __attribute__((vector_size(16), aligned(4), may_alias));
  static constexpr int64_t lanes = 4, panel = lanes * kVectors, rows = 6, steps = 8, apart = 4;
  static constexpr bool fetches = false;
};

// Vectors go in and out by reference: by value their calling convention would depend on the level.
template <class L>
RESNET_FUSED_INLINE void load_vector(typename L::Vector& v, const float* p) {
  v = *reinterpret_cast<const typename L::Anywhere*>(p);
}
template <class L>
RESNET_FUSED_INLINE void store_vector(float* p, const typename L::Vector& v) {
  *reinterpret_cast<typename L::Anywhere*>(p) = v;
}

// step(k, i) for k in [from, to), L::steps of them unrolled, of which it is step i; what is left over counts as their
// last.
template <class L, class Step>
RESNET_FUSED_INLINE void for_steps(int64_t from, int64_t to, Step&& step) {
  int64_t k = from;
  for (; k + L::steps <= to; k += L::steps) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < L::steps; ++i) step(k + i, i);
  }
  for (; k < to; ++k) step(k, L::steps - 1);
}

struct Nothing {
  RESNET_FUSED_INLINE void operator()() const {}
};

// c[r][j] = sum_k a[r][k] * b[k][j] for R rows and one panel, summed in the order of k. The panel's rows are `pitch`
// apart. `each` is called at every L::apart-th k.
template <class L, int64_t pitch, int64_t R, class Each>
RESNET_FUSED_INLINE void multiply_group(const float* a, int64_t a_pitch, const float* b, int64_t depth, float* c,
                                        int64_t c_pitch, Each& each) {
  Each at_work = each;            // in registers
  constexpr int64_t kAhead = 12;  // rows of the panel, on their way from the second-level cache
  typename L::Vector sums[R][kVectors] = {};
  for_steps<L>(0, depth, [&](int64_t k, int64_t i) __attribute__((always_inline)) {
    if (i % L::apart == 0) at_work();
    typename L::Vector columns[kVectors];
    if constexpr (L::fetches) {
#pragma GCC unroll 2
      for (int64_t j = 0; j < L::panel; j += kLine) __builtin_prefetch(b + (k + kAhead) * pitch + j);
    }
#pragma GCC unroll 2
    for (int64_t j = 0; j < kVectors; ++j) load_vector<L>(columns[j], b + k * pitch + j * L::lanes);
#pragma GCC unroll 16
    for (int64_t r = 0; r < R; ++r) {
      const float value = a[r * a_pitch + k];
#pragma GCC unroll 2
      for (int64_t j = 0; j < kVectors; ++j) multiply_add(sums[r][j], value, columns[j]);
    }
  });
#pragma GCC unroll 16
  for (int64_t r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int64_t j = 0; j < kVectors; ++j) store_vector<L>(c + r * c_pitch + j * L::lanes, sums[r][j]);
  }
  each = at_work;
}

template <class L, int64_t pitch, int64_t R, class Each>
RESNET_FUSED_INLINE void multiply_group_of(int64_t rows, const float* a, int64_t a_pitch, const float* b, int64_t depth,
                                           float* c, int64_t c_pitch, Each& each) {
  if constexpr (R > 0) {
    if (rows == R) return multiply_group<L, pitch, R>(a, a_pitch, b, depth, c, c_pitch, each);
    multiply_group_of<L, pitch, R - 1>(rows, a, a_pitch, b, depth, c, c_pitch, each);
  }
}

// The same for any number of rows, in groups of sizes as equal as they get; `between()` is called before each, and
// `each()` at every L::apart-th k of each.
template <class L, int64_t pitch = L::panel, class Between = Nothing, class Each = Nothing>
RESNET_FUSED_INLINE void multiply_rows(int64_t rows, const float* a, int64_t a_pitch, const float* b, int64_t depth,
                                       float* c, int64_t c_pitch, Between&& between = {}, Each&& each = {}) {
  const int64_t groups = (rows + L::rows - 1) / L::rows;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t begin = rows * group / groups, end = rows * (group + 1) / groups;
    between();
    multiply_group_of<L, pitch, L::rows>(end - begin, a + begin * a_pitch, a_pitch, b, depth, c + begin * c_pitch,
                                         c_pitch, each);
  }
}

// c[r][j] (+)= sum_m a[m][r] * b[m][j] for R columns of a and one panel of b, over `rows` rows in their order, each
// kept apart from what is there already: both are as they lie in memory, a row a pixel.
template <class L, int64_t R, class Each>
RESNET_FUSED_INLINE void multiply_columns_group(const float* a, int64_t a_pitch, const float* b, int64_t b_pitch,
                                                int64_t rows, bool add, float* c, Each& each) {
  Each at_work = each;  // in registers
  typename L::Vector sums[R][kVectors] = {};
  for (int64_t i = 0; i < R * L::panel; i += 16) __builtin_prefetch(c + i, 1);
#pragma GCC unroll 2
  for (int64_t m = 0; m < rows; ++m, a += a_pitch, b += b_pitch) {
    at_work();
    typename L::Vector columns[kVectors];
#pragma GCC unroll 2
    for (int64_t j = 0; j < kVectors; ++j) load_vector<L>(columns[j], b + j * L::lanes);
#pragma GCC unroll 16
    for (int64_t r = 0; r < R; ++r) {
      const float value = a[r];
#pragma GCC unroll 2
      for (int64_t j = 0; j < kVectors; ++j) multiply_add(sums[r][j], value, columns[j]);
    }
  }
#pragma GCC unroll 16
  for (int64_t r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int64_t j = 0; j < kVectors; ++j) {
      float* target = c + r * L::panel + j * L::lanes;
      typename L::Vector before = {};
      if (add) load_vector<L>(before, target);
      store_vector<L>(target, before + sums[r][j]);
    }
  }
  each = at_work;
}

template <class L, int64_t R, class Each>
RESNET_FUSED_INLINE void multiply_columns_group_of(int64_t columns, const float* a, int64_t a_pitch, const float* b,
                                                   int64_t b_pitch, int64_t rows, bool add, float* c, Each& each) {
  if constexpr (R > 0) {
    if (columns == R) return multiply_columns_group<L, R>(a, a_pitch, b, b_pitch, rows, add, c, each);
    multiply_columns_group_of<L, R - 1>(columns, a, a_pitch, b, b_pitch, rows, add, c, each);
  }
}

// The same for any number of columns of a; c: [columns][panel], without gaps. `between()` is called before each group,
// and `each()` for every row of each.
template <class L, class Between = Nothing, class Each = Nothing>
RESNET_FUSED_INLINE void multiply_columns(int64_t columns, const float* a, int64_t a_pitch, const float* b,
                                          int64_t b_pitch, int64_t rows, bool add, float* c, Between&& between = {},
                                          Each&& each = {}) {
  const int64_t groups = (columns + L::rows - 1) / L::rows;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t begin = columns * group / groups, end = columns * (group + 1) / groups;
    between();
    multiply_columns_group_of<L, L::rows>(end - begin, a + begin, a_pitch, b, b_pitch, rows, add, c + begin * L::panel,
                                          each);
  }
}

}  // namespace resnet_fused::cpu
