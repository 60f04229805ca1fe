// dz = a*g + b*z + d, g being the pooled gradient that each pixel of z gathers behind the ReLU: one read, one write.
//
// Bytes per element of z of b bytes, for 3x3 windows of stride 2: reads z (b), grad_out (b/4) and index (1/4), writes
// dz (b). The gradient and the index are asked for by each pixel of a window, 9/4 times; all but the first come from L1
// or L2. The stem of ResNet-50, bf16 [256, 64, 112, 112], moves 206 M elements * 4.75 bytes = 976 MB: at least 0.29 ms
// at the 3.35 TB/s of an H100.
#pragma once

#include "pool.cuh"

namespace resnet_fused::cuda {

// kAffine: b*z + d is added.
template <class T, bool kVectors, bool kAffine>
__global__ void __launch_bounds__(kThreads)
    norm_relu_pool_apply_kernel(const NormReluPoolApplyParams p, const PoolStrides by) {
  const PoolGeometry& geometry = p.geometry;
  const int64_t channels = geometry.channels, rows = geometry.samples * geometry.h.size * geometry.w.size;
  const Channels c = my_channels(channels);
  if (c.count == 0) return;
  float a[kGroup], b[kGroup], d[kGroup], scale[kGroup], shift[kGroup];
  load_coefficients(a, p.a, c, 0.f);
  load_coefficients(scale, p.scale, c, 0.f);
  load_coefficients(shift, p.shift, c, 0.f);
  if constexpr (kAffine) {
    load_coefficients(b, p.b, c, 0.f);
    load_coefficients(d, p.d, c, 0.f);
  }
  PixelWalk at(first_row(), row_step(), geometry.h.size, geometry.w.size);
  for (int64_t row = first_row(); row < rows; row += row_step(), at.advance()) {
    const Group<T> z = load<kVectors, T>(p.z, row, channels, c);
    float g[kGroup];
    gather_pooled<T, kVectors>(g, {p.grad_out, p.index}, geometry, by, at, c);
    mask_by_sign(g, z, scale, shift);
    Group<T> dz;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      float value = a[i] * g[i];
      if constexpr (kAffine) value += fmaf(b[i], to_float(z.v[i]), d[i]);
      dz.v[i] = from_float<T>(value);
    }
    store<kVectors, T>(p.dz, row, channels, c, dz);
  }
}

template <class T, bool kVectors>
void norm_relu_pool_apply_select(const NormReluPoolApplyParams& p, cudaStream_t stream) {
  const Tiling t(pixels_of(p.geometry), 8192, 4);
  const PoolStrides by(p.geometry);
  if (p.b) {
    RESNET_FUSED_LAUNCH((norm_relu_pool_apply_kernel<T, kVectors, true>), t.grid(), t.block(), stream, p, by);
  } else {
    RESNET_FUSED_LAUNCH((norm_relu_pool_apply_kernel<T, kVectors, false>), t.grid(), t.block(), stream, p, by);
  }
}

// T: float, __half or __nv_bfloat16. Nothing is launched for an empty tensor.
template <class T>
void launch_norm_relu_pool_apply(const NormReluPoolApplyParams& p, cudaStream_t stream) {
  const int64_t channels = p.geometry.channels;
  if (p.geometry.samples == 0 || channels == 0) return;
  const bool vectors =
      channels % kGroup == 0 && aligned(p.grad_out) && aligned(p.index) && aligned(p.z) && aligned(p.dz);
  vectors ? norm_relu_pool_apply_select<T, true>(p, stream) : norm_relu_pool_apply_select<T, false>(p, stream);
}

}  // namespace resnet_fused::cuda
