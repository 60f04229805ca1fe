// The inner loops of stem.h, for one level of the machine.
#pragma once

#include "product.h"
#include "stem.h"

namespace resnet_fused::cpu {

// Elements [from, to) of runs.
struct StemTaps {
  int64_t from, to;
};

// M outputs of a panel of V vectors, each a sum over the rows of the filter and in them over the run, in that order.
// kStep: floats from pixel to pixel where the compiler shall know them, else 0. `columns`: of the panel that are there.
template <class L, int64_t V, int64_t kStep, int64_t M>
RESNET_FUSED_INLINE void stem_group(const Stem& p, const float* const* rows, int64_t offset, StemTaps taps,
                                    const float* weight, float* out, int64_t columns) {
  const int64_t step = kStep ? kStep : p.step;
  typename L::Vector sums[M][V] = {};
  for (int64_t r = 0; r < p.R; ++r) {
    if (!rows[r]) continue;
    const float* a = rows[r] + offset;
    const float* b = weight + (r * p.run + taps.from) * p.panel;
    for (int64_t t = taps.from; t < taps.to; ++t, b += p.panel) {
      typename L::Vector columns_of[V];
#pragma GCC unroll 2
      for (int64_t j = 0; j < V; ++j) load_vector<L>(columns_of[j], b + j * L::lanes);
#pragma GCC unroll 16
      for (int64_t m = 0; m < M; ++m) {
        const float value = a[m * step + t];
#pragma GCC unroll 2
        for (int64_t j = 0; j < V; ++j) multiply_add(sums[m][j], value, columns_of[j]);
      }
    }
  }
#pragma GCC unroll 16
  for (int64_t m = 0; m < M; ++m) {
    if (columns == V * L::lanes) {
#pragma GCC unroll 2
      for (int64_t j = 0; j < V; ++j) store_vector<L>(out + m * p.K + j * L::lanes, sums[m][j]);
    } else {
      float all[V * L::lanes];
#pragma GCC unroll 2
      for (int64_t j = 0; j < V; ++j) store_vector<L>(all + j * L::lanes, sums[m][j]);
      std::copy_n(all, columns, out + m * p.K);
    }
  }
}

// The smallest group that so many outputs or more are cut into: no smaller one is compiled for each step.
template <class L>
constexpr int64_t kStemGroup = L::rows / 2;

template <class L, int64_t V, int64_t kStep, int64_t M>
RESNET_FUSED_INLINE void stem_group_of(int64_t outputs, const Stem& p, const float* const* rows, int64_t offset,
                                       StemTaps taps, const float* weight, float* out, int64_t columns) {
  if constexpr (M >= (kStep ? kStemGroup<L> : 1)) {
    if (outputs == M) return stem_group<L, V, kStep, M>(p, rows, offset, taps, weight, out, columns);
    stem_group_of<L, V, kStep, M - 1>(outputs, p, rows, offset, taps, weight, out, columns);
  }
}

// In groups of sizes as equal as they get, over whole runs; where a weight is not finite one by one, over what lies in
// the image alone.
template <class L, int64_t V, int64_t kStep>
RESNET_FUSED_INLINE void stem_panel(const Stem& p, const float* const* rows, int64_t q, int64_t end,
                                    const float* weight, float* out, int64_t columns) {
  const int64_t outputs = end - q, most = p.finite ? L::rows : 1, groups = (outputs + most - 1) / most;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = outputs * group / groups, size = outputs * (group + 1) / groups - first;
    const int64_t left = (q + first) * p.stride[1] - p.padding[1];
    StemTaps taps{0, p.run};
    if (!p.finite) {
      taps.from = std::min(p.run, std::max<int64_t>(0, -left) * p.C);
      taps.to = std::max(taps.from, std::min(p.S, p.W - left) * p.C);
    }
    stem_group_of<L, V, kStep, L::rows>(size, p, rows, (q + first) * p.step, taps, weight, out + first * p.K, columns);
  }
}

template <class L, int64_t kStep>
RESNET_FUSED_INLINE void stem_convolve(const Stem& p, const float* const* rows, int64_t q, int64_t end, float* out) {
  for (int64_t panel = 0; panel < p.panels; ++panel) {
    const int64_t k = panel * p.panel, columns = std::min(p.K - k, p.panel);
    const float* weight = p.packed + panel * p.R * p.run * p.panel;
    if (columns <= L::lanes) {
      stem_panel<L, 1, kStep>(p, rows, q, end, weight, out + k, columns);
    } else {
      stem_panel<L, kVectors, kStep>(p, rows, q, end, weight, out + k, columns);
    }
  }
}

// sums[t][j] += sum_q grad[q][j] * x[q][t] for M elements of a run.
template <class L, int64_t V, int64_t M>
RESNET_FUSED_INLINE void stem_products(const float* x, int64_t step, const float* grad, int64_t pitch, int64_t outputs,
                                       float* sums, int64_t panel) {
  typename L::Vector found[M][V] = {};
#pragma GCC unroll 2
  for (int64_t q = 0; q < outputs; ++q, x += step, grad += pitch) {
    typename L::Vector columns[V];
#pragma GCC unroll 2
    for (int64_t j = 0; j < V; ++j) load_vector<L>(columns[j], grad + j * L::lanes);
#pragma GCC unroll 16
    for (int64_t m = 0; m < M; ++m) {
      const float value = x[m];
#pragma GCC unroll 2
      for (int64_t j = 0; j < V; ++j) multiply_add(found[m][j], value, columns[j]);
    }
  }
#pragma GCC unroll 16
  for (int64_t m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int64_t j = 0; j < V; ++j) {
      typename L::Vector before;
      load_vector<L>(before, sums + m * panel + j * L::lanes);
      store_vector<L>(sums + m * panel + j * L::lanes, before + found[m][j]);
    }
  }
}

template <class L, int64_t V, int64_t M>
RESNET_FUSED_INLINE void stem_products_of(int64_t elements, const float* x, int64_t step, const float* grad,
                                          int64_t pitch, int64_t outputs, float* sums, int64_t panel) {
  if constexpr (M > 0) {
    if (elements == M) return stem_products<L, V, M>(x, step, grad, pitch, outputs, sums, panel);
    stem_products_of<L, V, M - 1>(elements, x, step, grad, pitch, outputs, sums, panel);
  }
}

inline constexpr int64_t kStemOutputs = 256;  // of a row whose products are added in one register

template <class L, int64_t V>
RESNET_FUSED_INLINE void stem_correlate_panel(const Stem& p, const float* const* rows, const float* grad, int64_t pitch,
                                              float* sums) {
  const int64_t groups = (p.run + L::rows - 1) / L::rows;
  for (int64_t q = 0; q < p.Q; q += kStemOutputs) {
    const int64_t outputs = std::min(kStemOutputs, p.Q - q);
    for (int64_t r = 0; r < p.R; ++r) {
      if (!rows[r]) continue;
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t first = p.run * group / groups, size = p.run * (group + 1) / groups - first;
        stem_products_of<L, V, L::rows>(size, rows[r] + q * p.step + first, p.step, grad + q * pitch, pitch, outputs,
                                        sums + (r * p.run + first) * p.panel, p.panel);
      }
    }
  }
}

template <class L>
RESNET_FUSED_INLINE void stem_correlate(const Stem& p, const float* const* rows, const float* grad, int64_t pitch,
                                        float* sums) {
  for (int64_t panel = 0; panel < p.panels; ++panel) {
    const int64_t k = panel * p.panel;
    float* own = sums + panel * p.R * p.run * p.panel;
    if (p.K - k <= L::lanes) {
      stem_correlate_panel<L, 1>(p, rows, grad + k, pitch, own);
    } else {
      stem_correlate_panel<L, kVectors>(p, rows, grad + k, pitch, own);
    }
  }
}

}  // namespace resnet_fused::cpu
