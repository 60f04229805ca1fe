// The sums of g and g*(z - mean), g being the pooled gradient that each pixel of z gathers behind the ReLU: nothing but
// sums is written. Two stages, see fold.cuh.
//
// Bytes per element of z of b bytes, for 3x3 windows of stride 2: reads z (b), grad_out (b/4) and index (1/4). The
// latter two are asked for by each pixel of a window, 9/4 times; all but the first come from L1 or L2. The stem of
// ResNet-50, bf16 [256, 64, 112, 112], moves 206 M elements * 2.75 bytes = 565 MB: at least 0.17 ms at the 3.35 TB/s of
// an H100.
#pragma once

#include "pool.cuh"

namespace resnet_fused::cuda {

inline Tiling norm_relu_pool_backward_tiling(const PoolGeometry& g) { return Tiling(pixels_of(g), 1024, 8); }
int64_t pool_partial_floats(const PoolGeometry& g) {
  return norm_relu_pool_backward_tiling(g).row_blocks * 2 * g.channels;
}

template <class T, bool kVectors>
__global__ void __launch_bounds__(kThreads)
    norm_relu_pool_backward_kernel(const NormReluPoolBackwardParams p, const PoolStrides by) {
  const PoolGeometry& geometry = p.geometry;
  const int64_t channels = geometry.channels;
  const Channels c = my_channels(channels);
  float mean[kGroup], scale[kGroup], shift[kGroup], sum[2][kGroup] = {};
  load_coefficients(mean, p.mean, c, 0.f);
  load_coefficients(scale, p.scale, c, 0.f);
  load_coefficients(shift, p.shift, c, 0.f);
  // A thread beyond the last channel has no row to visit, but must take part in the fold.
  const int64_t end = c.count ? geometry.samples * geometry.h.size * geometry.w.size : 0;
  PixelWalk at(first_row(), row_step(), geometry.h.size, geometry.w.size);
  for (int64_t row = first_row(); row < end; row += row_step(), at.advance()) {
    const Group<T> z = load<kVectors, T>(p.z, row, channels, c);
    float g[kGroup];
    gather_pooled<T, kVectors>(g, {p.grad_out, p.index}, geometry, by, at, c);
    mask_by_sign(g, z, scale, shift);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      sum[0][i] += g[i];
      sum[1][i] = fmaf(g[i], to_float(z.v[i]) - mean[i], sum[1][i]);
    }
  }
  fold_block<2>(sum, p.partial, channels, c);
}

// T: float, __half or __nv_bfloat16. Nothing is launched for an empty tensor; the caller zeroes the sums then.
template <class T>
void launch_norm_relu_pool_backward(const NormReluPoolBackwardParams& p, cudaStream_t stream) {
  const int64_t channels = p.geometry.channels;
  if (p.geometry.samples == 0 || channels == 0) return;
  const Tiling t = norm_relu_pool_backward_tiling(p.geometry);
  const PoolStrides by(p.geometry);
  if (channels % kGroup == 0 && aligned(p.grad_out) && aligned(p.index) && aligned(p.z)) {
    RESNET_FUSED_LAUNCH((norm_relu_pool_backward_kernel<T, true>), t.grid(), t.block(), stream, p, by);
  } else {
    RESNET_FUSED_LAUNCH((norm_relu_pool_backward_kernel<T, false>), t.grid(), t.block(), stream, p, by);
  }
  launch_fold(FoldParams<2>{p.partial, t.row_blocks, channels, {p.sums[0], p.sums[1]}}, stream);
}

}  // namespace resnet_fused::cuda
