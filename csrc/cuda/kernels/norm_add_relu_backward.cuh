// g = keep ? grad_out : 0, and per channel the sums of f*g, f*g*(z - mean), g and
// g*(residual - residual_mean) that batch norm's backward needs.
//
// Bytes per element of b bytes: reads grad_out (b), z (b), the mask (1/8; or b for the forward's output; or nothing,
// when the sign is recomputed) and residual (b), writes g (b). bf16 with z, bit mask and g: 6.125 bytes/element.
//
// Sums are taken in two stages without atomics, in an order that depends on the shape alone: every thread sums its rows
// in float32, a block folds its threads, and a second kernel folds the blocks in float64. The second stage reads and
// writes at most 4096 * 8 * 4 sums (0.5 MB) however large the tensor is.
#pragma once

#include "tile.cuh"

namespace resnet_fused::cuda {

constexpr int kFoldChannels = 32, kFoldRows = 16;  // threads of a block of the second stage

inline Tiling norm_add_relu_backward_tiling(const Extent& extent) { return Tiling(extent, 1024, 8); }

// Floats of scratch: one row of `sums` vectors of C channels for every block down.
inline int64_t partial_floats(const Extent& e, bool residual) {
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

// Fold one value per thread over the rows of the block, always in the same order, and let the first row write it.
template <int kSums>
__device__ inline void fold_block(const float (&sum)[kSums][kGroup], float* partial, int64_t channels, Channels c) {
  __shared__ float shared[kThreads * kGroup];
  const int across = blockDim.x * kGroup;
  for (int s = 0; s < kSums; ++s) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) shared[threadIdx.y * across + i * blockDim.x + threadIdx.x] = sum[s][i];
    __syncthreads();
    for (int i = threadIdx.y; i < kGroup; i += blockDim.y) {
      float total = 0.f;
      for (int y = 0; y < static_cast<int>(blockDim.y); ++y) total += shared[y * across + i * blockDim.x + threadIdx.x];
      if (i < c.count) partial[(static_cast<int64_t>(blockIdx.x) * kSums + s) * channels + c.first + i] = total;
    }
    __syncthreads();
  }
}

template <class T, bool kVectors, bool kRecompute, bool kResidual>
__global__ void __launch_bounds__(kThreads) norm_add_relu_backward_kernel(const NormAddReluBackwardParams p) {
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

// Second stage: blockIdx.y is the sum, a block takes 32 channels and walks down the partial sums of all blocks.
template <int kSums>
__global__ void __launch_bounds__(kFoldChannels* kFoldRows)
    fold_partial_kernel(const NormAddReluBackwardParams p, int64_t row_blocks) {
  __shared__ double shared[kFoldRows][kFoldChannels];
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kFoldChannels + threadIdx.x;
  const int s = blockIdx.y;
  double total = 0.;
  if (channel < p.extent.channels) {
#pragma unroll 4
    for (int64_t row = threadIdx.y; row < row_blocks; row += kFoldRows) {
      total += p.partial[(row * kSums + s) * p.extent.channels + channel];
    }
  }
  shared[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y == 0 && channel < p.extent.channels && p.sums[s]) {
    for (int y = 1; y < kFoldRows; ++y) total += shared[y][threadIdx.x];
    p.sums[s][channel] = static_cast<float>(total);
  }
}

template <class T, bool kVectors, bool kRecompute, bool kResidual>
void norm_add_relu_backward_stages(const NormAddReluBackwardParams& p, cudaStream_t stream) {
  constexpr int kSums = kResidual ? 4 : 2;
  const Tiling t = norm_add_relu_backward_tiling(p.extent);
  RESNET_FUSED_LAUNCH((norm_add_relu_backward_kernel<T, kVectors, kRecompute, kResidual>), t.grid(), t.block(), stream,
                      p);
  const dim3 grid(static_cast<unsigned>((p.extent.channels + kFoldChannels - 1) / kFoldChannels), kSums);
  RESNET_FUSED_LAUNCH(fold_partial_kernel<kSums>, grid, dim3(kFoldChannels, kFoldRows), stream, p, t.row_blocks);
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
