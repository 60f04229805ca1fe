// g = keep ? grad_out : 0, and per channel the sums of f*g, f*g*(z - mean), g and
// g*(residual - residual_mean) that batch norm's backward needs.
//
// Bytes per element of b bytes: reads grad_out (b), z (b), the mask (1/8; or b for the forward's output; or nothing,
// when the sign is recomputed) and residual (b), writes g (b). bf16 with z, bit mask and g: 6.125 bytes/element.
// Sums are taken in two stages, see fold.cuh.
#pragma once

#include "fold.cuh"

namespace resnet_fused::cuda {

inline Tiling norm_add_relu_backward_tiling(const Extent& extent) { return Tiling(extent, 1024, 8); }

// Floats of scratch: one row of `sums` vectors of C channels for every block down.
int64_t partial_floats(const Extent& e, bool residual) {
  return norm_add_relu_backward_tiling(e).row_blocks * (residual ? 4 : 2) * e.channels;
}

// Which of eight channels let a gradient pass: bit i for channel i.
template <class T, bool kVectors, bool kRecompute>
__device__ inline unsigned keep_bits(const NormAddReluBackwardParams& p, int64_t row, Channels c, const Group<T>& z,
                                     const float (&scale)[kGroup], const float (&shift)[kGroup]) {
  unsigned bits = 0;
  if constexpr (kRecompute) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) bits |= unsigned(!(fmaf(scale[i], to_float(z.v[i]), shift[i]) <= 0.f)) << i;
  } else if (p.mask_bits) {
    bits = p.mask_bits[row * ((p.extent.channels + 7) / 8) + c.first / 8];
  } else if (p.mask_output) {
    const Group<T> out = load<kVectors, T>(p.mask_output, row, p.extent.channels, c);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) bits |= unsigned(!(to_float(out.v[i]) <= 0.f)) << i;
  } else {
    bits = 0xFF;
  }
  return bits;
}

template <class T, bool kVectors, bool kRecompute, bool kResidual>
__global__ void __launch_bounds__(kThreads, 2) norm_add_relu_backward_kernel(const NormAddReluBackwardParams p) {
  const Channels c = my_channels(p.extent.channels);
  float scale[kGroup], shift[kGroup];
  if constexpr (kRecompute) {
    load_coefficients(scale, p.scale, c, 0.f);
    load_coefficients(shift, p.shift, c, 0.f);
  }
  float mean[kGroup], residual_mean[kGroup];
  load_coefficients(mean, p.mean, c, 0.f);
  if constexpr (kResidual) load_coefficients(residual_mean, p.residual_mean, c, 0.f);
  constexpr int kSums = kResidual ? 4 : 2;
  float sum[kSums][kGroup] = {};
  // A thread beyond the last channel has no row to visit, but must take part in the fold.
  const int64_t end = c.count ? p.extent.rows : 0;
  for (int64_t row = first_row(); row < end; row += row_step()) {
    Group<T> grad = load<kVectors, T>(p.grad_out, row, p.extent.channels, c);
    Group<T> z, residual;
    if (kRecompute || p.z) z = load<kVectors, T>(p.z, row, p.extent.channels, c);
    if constexpr (kResidual) residual = load<kVectors, T>(p.residual, row, p.extent.channels, c);
    const unsigned keep = keep_bits<T, kVectors, kRecompute>(p, row, c, z, scale, shift);
    const float factor = p.sample_factor ? p.sample_factor[row / p.extent.rows_per_sample] : 1.f;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (!(keep >> i & 1u)) grad.v[i] = from_float<T>(0.f);  // a select: a masked NaN becomes 0
      const float g = to_float(grad.v[i]), factored = factor * g;
      sum[0][i] += factored;
      if (kRecompute || p.z) sum[1][i] = fmaf(factored, to_float(z.v[i]) - mean[i], sum[1][i]);
      if constexpr (kResidual) {
        sum[2][i] += g;
        sum[3][i] = fmaf(g, to_float(residual.v[i]) - residual_mean[i], sum[3][i]);
      }
    }
    if (p.g) store<kVectors, T>(p.g, row, p.extent.channels, c, grad);
  }
  fold_block<kSums>(sum, p.partial, p.extent.channels, c);
}

template <class T, bool kVectors, bool kRecompute, bool kResidual>
void norm_add_relu_backward_stages(const NormAddReluBackwardParams& p, cudaStream_t stream) {
  constexpr int kSums = kResidual ? 4 : 2;
  const Tiling t = norm_add_relu_backward_tiling(p.extent);
  RESNET_FUSED_LAUNCH((norm_add_relu_backward_kernel<T, kVectors, kRecompute, kResidual>), t.grid(), t.block(), stream,
                      p);
  FoldParams<kSums> fold{p.partial, t.row_blocks, p.extent.channels, {}};
  for (int s = 0; s < kSums; ++s) fold.sums[s] = p.sums[s];
  launch_fold(fold, stream);
}

template <class T, bool kVectors>
void norm_add_relu_backward_select(const NormAddReluBackwardParams& p, cudaStream_t stream) {
  if (p.scale && p.residual) {
    norm_add_relu_backward_stages<T, kVectors, true, true>(p, stream);
  } else if (p.scale) {
    norm_add_relu_backward_stages<T, kVectors, true, false>(p, stream);
  } else if (p.residual) {
    norm_add_relu_backward_stages<T, kVectors, false, true>(p, stream);
  } else {
    norm_add_relu_backward_stages<T, kVectors, false, false>(p, stream);
  }
}

// T: float, __half or __nv_bfloat16. Nothing is launched for an empty tensor; the caller zeroes the sums then.
// A `scale` demands that the sign be recomputed: pass null where there is a mask, or no ReLU.
template <class T>
void launch_norm_add_relu_backward(const NormAddReluBackwardParams& p, cudaStream_t stream) {
  if (p.extent.rows == 0 || p.extent.channels == 0) return;
  const bool vectors = p.extent.channels % kGroup == 0 && aligned(p.grad_out) && aligned(p.z) &&
                       aligned(p.mask_output) && aligned(p.residual) && aligned(p.g);
  vectors ? norm_add_relu_backward_select<T, true>(p, stream) : norm_add_relu_backward_select<T, false>(p, stream);
}

}  // namespace resnet_fused::cuda
