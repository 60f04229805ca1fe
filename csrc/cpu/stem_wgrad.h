// The gradient of the weight of a convolution of few channels, wherever the gradient at its output comes from.
//
// Rows of outputs form chunks, which depend on the shape alone; each adds up its products in float32, a row in
// registers, and chunks are added up in double, in their order: the same bits with any number of threads.
#pragma once

#include <vector>

#include "alloc.h"
#include "conv1x1_values.h"
#include "product.h"
#include "stem.h"
#include "winograd_work.h"

namespace resnet_fused::cpu {
namespace {

inline constexpr int64_t kStemChunks = 64, kStemRows = 14;  // at most, of a chunk at least

// The sums of rows [begin, end), of which `grad_of` has the gradient [Q, K].
template <class Row>
void correlate_rows(const Stem& p, const StemStages& at, Row& grad_of, int64_t begin, int64_t end, float* sums) {
  const int64_t lanes = p.panel / kVectors, pitch = p.K % lanes ? p.panels * p.panel : p.K;
  std::vector<float> padded(pitch == p.K ? 0 : p.Q * pitch);
  StemRows image(p);
  std::fill_n(sums, p.packed_size(), 0.0f);
  for (int64_t row = begin; row < end; ++row) {
    const float* own = grad_of(row);
    for (int64_t q = 0; q < p.Q && pitch != p.K; ++q) std::copy_n(own + q * p.K, p.K, &padded[q * pitch]);
    at.correlate(p, image.under(row), pitch == p.K ? own : padded.data(), pitch, sums);
  }
}

// total[j] = sum of from[j] over the chunks, `gap` apart.
RESNET_FUSED_CLONES void add_panels(double* __restrict total, const float* __restrict from, int64_t chunks, int64_t gap,
                                    int64_t panel) {
  for (int64_t j = 0; j < panel; ++j) total[j] = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk, from += gap) {
    for (int64_t j = 0; j < panel; ++j) total[j] += from[j];
  }
}

// Adds up the chunks into `out`, whatever its strides; whether all is finite.
inline bool add_chunks(const Stem& p, const float* sums, int64_t chunks, const Tensor& out) {
  const int64_t by_k = out.stride(0), by_c = out.stride(1), by_r = out.stride(2), by_s = out.stride(3);
  std::vector<double> total(p.panel);
  bool finite = true;
  for (int64_t row = 0; row < p.panels * p.R * p.run; ++row) {
    add_panels(total.data(), sums + row * p.panel, chunks, p.packed_size(), p.panel);
    const int64_t k = row / (p.R * p.run) * p.panel, at = row % (p.R * p.run);
    float* to = data<float>(out) + k * by_k + at % p.C * by_c + at / p.run * by_r + at % p.run / p.C * by_s;
    for (int64_t j = 0; j < std::min(p.panel, p.K - k); ++j) {
      const float value = static_cast<float>(total[j]);
      to[j * by_k] = value;
      finite &= value - value == 0;
    }
  }
  return finite;
}

// ATen's own gradient, in the strides of `out`.
inline void stem_gradient_by_aten(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                  Tensor& out) {
  using torch::headeronly::HeaderOnlyArrayRef;
  using torch::stable::detail::from, torch::stable::detail::to;
  constexpr bool mask[3] = {false, true, false};
  StableIValue stack[11] = {from(grad),
                            from(x),
                            from(weight),
                            from(std::nullopt),
                            ints(stride),
                            ints(padding),
                            ints({1, 1}),
                            from(false),
                            ints({0, 0}),
                            from(int64_t(1)),
                            from(HeaderOnlyArrayRef<bool>(mask, 3))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::convolution_backward", "", stack, TORCH_ABI_VERSION));
  Tensor results[3] = {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};  // ours to free
  torch::stable::copy_(out, results[1]);
}

// An uninitialised gradient in the strides of the weight.
inline Tensor empty_like_weight(const Tensor& weight) {
  return empty_strided<4>({weight.size(0), weight.size(1), weight.size(2), weight.size(3)},
                          {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)},
                          weight.scalar_type());
}

// Fills `out`; whether all of it is finite: zeros around the image times what is not would be NaN where stock's sum has
// no such product. `make()` gives a thread what has the gradient of a row of outputs.
template <class Make>
bool stem_gradient(Stem& p, const Tensor& out, const Make& make) {
  const StemStages& at = stem_stages();
  p.panel = at.panel, p.panels = (p.K + p.panel - 1) / p.panel;
  const int64_t rows = p.N * p.P, chunks = std::clamp(rows / kStemRows, int64_t(1), kStemChunks);
  const auto sums = aligned_array<float>(chunks * p.packed_size());
  share_units(chunks, [&] {
    return [&, grad_of = make()](int64_t chunk) mutable {
      correlate_rows(p, at, grad_of, rows * chunk / chunks, rows * (chunk + 1) / chunks,
                     sums.get() + chunk * p.packed_size());
    };
  });
  return add_chunks(p, sums.get(), chunks, out);
}

}  // namespace
}  // namespace resnet_fused::cpu
