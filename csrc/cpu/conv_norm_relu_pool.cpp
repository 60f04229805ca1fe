// The stem of a network in evaluation: convolution of few channels, batch norm, ReLU and max pool in one pass.
//
// Each row of the convolution is computed once by a thread, into a ring of as many rows as a window has, which the
// second-level cache holds; only the pooled output is written.
// Bytes: x and weight once, out once; FLOPs those of the convolution.
#include "../checks/conv_norm_relu_pool.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <utility>
#include <vector>

#include "alloc.h"
#include "pool.h"
#include "stem.h"

namespace resnet_fused::cpu {
namespace {

// Bias and batch norm with running statistics as scale and shift; absent vectors are none.
struct Norm {
  std::vector<float> scale, shift;

  Norm(int64_t channels, const OptionalTensor& bias, const OptionalTensor& mean, const OptionalTensor& var,
       const OptionalTensor& gamma, const OptionalTensor& beta, double eps)
      : scale(channels, 1.0f), shift(channels) {
    for (int64_t k = 0; k < channels; ++k) {
      double factor = 1, offset = bias ? data<float>(bias)[k] : 0.0;
      if (mean) {
        factor = (gamma ? data<float>(gamma)[k] : 1.0) / std::sqrt(data<float>(var)[k] + eps);
        offset = (offset - data<float>(mean)[k]) * factor + (beta ? data<float>(beta)[k] : 0.0);
      }
      scale[k] = static_cast<float>(factor), shift[k] = static_cast<float>(offset);
    }
  }
};

// The later one, if it is greater or NaN.
RESNET_FUSED_INLINE float winner(float best, float value) { return (value > best) | (value != value) ? value : best; }

// best = winner, over `rows`, of scale*row + shift: of [M, C] outputs each. All rows of a window are met at once: what
// this reads and writes in the second-level cache is what it takes.
template <size_t... r>
RESNET_FUSED_CLONES void meet_rows(float* __restrict best, const float* const* rows, const float* __restrict scale,
                                   const float* __restrict shift, int64_t M, int64_t C, std::index_sequence<r...>) {
  const float* const row[] = {rows[r]...};
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t c = 0; c < C; ++c) {
      const float value[] = {row[r][m * C + c] * scale[c] + shift[c]...};
      float found = value[0];
      for (size_t i = 1; i < sizeof...(r); ++i) found = winner(found, value[i]);
      best[m * C + c] = found;
    }
  }
}

// The same of any number of rows.
RESNET_FUSED_CLONES void meet_any(float* __restrict best, const float* const* rows, int64_t count,
                                  const float* __restrict scale, const float* __restrict shift, int64_t M, int64_t C) {
  for (int64_t r = 0; r < count; ++r) {
    const float* __restrict row = rows[r];
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t c = 0; c < C; ++c) {
        const float value = row[m * C + c] * scale[c] + shift[c];
        best[m * C + c] = r ? winner(best[m * C + c], value) : value;
      }
    }
  }
}

void meet(float* best, const float* const* rows, int64_t count, const Norm& norm, int64_t M, int64_t C) {
  const float *scale = norm.scale.data(), *shift = norm.shift.data();
  if (count == 2) return meet_rows(best, rows, scale, shift, M, C, std::make_index_sequence<2>());
  if (count == 3) return meet_rows(best, rows, scale, shift, M, C, std::make_index_sequence<3>());
  meet_any(best, rows, count, scale, shift, M, C);
}

// ReLU and windows of a row [w.size, C] in which the rows of each window have met already; NaN passes.
RESNET_FUSED_CLONES void pool_columns(float* __restrict out, const float* __restrict row, const PoolAxis& w,
                                      int64_t C) {
  for (int64_t o = 0; o < w.windows; ++o, out += C) {
    const int64_t first = std::max<int64_t>(0, w.start(o)), end = std::min(w.size, w.start(o) + w.kernel);
    const float* __restrict column = row + first * C;
    if (end - first == 3) {
      for (int64_t c = 0; c < C; ++c) {
        const float best = winner(winner(column[c], column[C + c]), column[2 * C + c]);
        out[c] = best < 0 ? 0.0f : best;
      }
      continue;
    }
    for (int64_t c = 0; c < C; ++c) out[c] = column[c];
    for (int64_t i = first + 1; i < end; ++i) {
      for (int64_t c = 0; c < C; ++c) out[c] = winner(out[c], row[i * C + c]);
    }
    for (int64_t c = 0; c < C; ++c) out[c] = out[c] < 0 ? 0.0f : out[c];
  }
}

// Rows [begin, end) of the pooled rows of all images.
void pool_rows(const Stem& p, const Norm& norm, const PoolShape& pool, int64_t begin, int64_t end, float* out) {
  const StemStages& at = stem_stages();
  const PoolAxis &h = pool.h, &w = pool.w;
  const int64_t in_row = p.Q * p.K, out_row = w.windows * p.K;
  const auto ring = aligned_array<float>(h.kernel * in_row), best = aligned_array<float>(in_row);
  std::vector<const float*> rows(h.kernel);
  StemRows image(p);
  int64_t next = 0;  // rows of the convolution before this one are there
  for (int64_t y = begin; y < end; ++y) {
    const int64_t first = y / h.windows * p.P, start = h.start(y % h.windows);
    const int64_t top = first + std::max<int64_t>(0, start), bottom = first + std::min(h.size, start + h.kernel);
    for (next = std::max(next, top); next < bottom; ++next) {
      at.convolve(p, image.under(next), 0, p.Q, ring.get() + next % h.kernel * in_row);
    }
    for (int64_t row = top; row < bottom; ++row) rows[row - top] = ring.get() + row % h.kernel * in_row;
    meet(best.get(), rows.data(), bottom - top, norm, p.Q, p.K);
    pool_columns(out + y * out_row, best.get(), w, p.K);
  }
}

Tensor conv_norm_relu_pool(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                           const OptionalTensor& mean, const OptionalTensor& var, const OptionalTensor& gamma,
                           const OptionalTensor& beta, double eps, const std::vector<int64_t>& stride,
                           const std::vector<int64_t>& padding, const std::vector<int64_t>& pool_kernel,
                           const std::vector<int64_t>& pool_stride, const std::vector<int64_t>& pool_padding) {
  const char* op = "conv_norm_relu_pool";
  check_stem(op, x, weight, stride, padding);
  Stem p(x, weight, stride, padding);
  // Never touched: it has the shape of what is not written.
  const Tensor z = empty_strided<4>(p.sizes(), {0, 0, 0, 0}, ScalarType::Float);
  check_conv_norm_relu_pool(z, bias, mean, var, gamma, beta);
  check_pooling(op, z, pool_kernel, pool_stride, pool_padding);
  const PoolShape pool(z, pool_kernel, pool_stride, pool_padding);
  Tensor out = pool.empty_pooled(ScalarType::Float);
  const auto packed = pack_stem(p, weight);
  const Norm norm(p.K, bias, mean, var, gamma, beta, eps);
  torch::stable::parallel_for(0, p.N * pool.h.windows, 1, [&](int64_t begin, int64_t end) {
    pool_rows(p, norm, pool, begin, end, data<float>(out));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { m.impl("conv_norm_relu_pool", TORCH_BOX(&conv_norm_relu_pool)); }

}  // namespace resnet_fused::cpu
