// dz = a * f * (keep ? g : 0) + b * z + d + residual: one read of g, z and residual, one write of dz, which may be g.
//
// Bytes per element of b bytes: reads g (b), z (b, where the sign or the affine term needs it) and residual (b), writes
// dz (b); a mask of bits is 1/8 more; coefficients stay in registers. bf16 [256, 256, 56, 56] with z moves 206 M
// elements * 6 bytes = 1.23 GB: at least 0.37 ms at the 3.35 TB/s of an H100.
#pragma once

#include "tile.cuh"

namespace resnet_fused::cuda {

// kMasked: keep = not (scale*z + shift <= 0), else what mask_bits say, if there are some. kAffine: b*z + d is added.
template <class T, bool kVectors, bool kMasked, bool kAffine>
__global__ void __launch_bounds__(kThreads) lazy_grad_apply_kernel(const LazyGradApplyParams p) {
  const Channels c = my_channels(p.extent.channels);
  if (c.count == 0) return;
  float a[kGroup], b[kGroup], d[kGroup], scale[kGroup], shift[kGroup];
  load_coefficients(a, p.a, c, 1.f);
  if constexpr (kAffine) {
    load_coefficients(b, p.b, c, 0.f);
    load_coefficients(d, p.d, c, 0.f);
  }
  if constexpr (kMasked) {
    load_coefficients(scale, p.scale, c, 0.f);
    load_coefficients(shift, p.shift, c, 0.f);
  }
  for (int64_t row = first_row(); row < p.extent.rows; row += row_step()) {
    Group<T> group = load<kVectors, T>(p.g, row, p.extent.channels, c);
    const Group<T> z = load_if<kVectors, T>(kMasked || kAffine, p.z, row, p.extent.channels, c);
    const Group<T> residual = load_if<kVectors, T>(p.residual != nullptr, p.residual, row, p.extent.channels, c);
    unsigned keep = 0xFF;
    if (!kMasked && p.mask_bits) keep = p.mask_bits[row * ((p.extent.channels + 7) / 8) + c.first / 8];
    const float factor = p.sample_factor ? p.sample_factor[row / p.extent.rows_per_sample] : 1.f;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      float value = to_float(group.v[i]);
      if constexpr (kMasked) {  // a select: a masked NaN becomes 0. fmaf as in the forward, whose sign this is
        if (fmaf(scale[i], to_float(z.v[i]), shift[i]) <= 0.f) value = 0.f;
      } else if (!(keep >> i & 1u)) {
        value = 0.f;
      }
      value = factor * value * a[i];
      if constexpr (kAffine) value += fmaf(b[i], to_float(z.v[i]), d[i]);
      if (p.residual) value += to_float(residual.v[i]);
      group.v[i] = from_float<T>(value);
    }
    store<kVectors, T>(p.dz, row, p.extent.channels, c, group);
  }
}

inline Tiling lazy_grad_apply_tiling(const Extent& extent) { return Tiling(extent, 8192, 4); }

template <class T, bool kVectors>
void lazy_grad_apply_select(const LazyGradApplyParams& p, cudaStream_t stream) {
  const Tiling t = lazy_grad_apply_tiling(p.extent);
  if (p.scale && p.b) {
    RESNET_FUSED_LAUNCH((lazy_grad_apply_kernel<T, kVectors, true, true>), t.grid(), t.block(), stream, p);
  } else if (p.scale) {
    RESNET_FUSED_LAUNCH((lazy_grad_apply_kernel<T, kVectors, true, false>), t.grid(), t.block(), stream, p);
  } else if (p.b) {
    RESNET_FUSED_LAUNCH((lazy_grad_apply_kernel<T, kVectors, false, true>), t.grid(), t.block(), stream, p);
  } else {
    RESNET_FUSED_LAUNCH((lazy_grad_apply_kernel<T, kVectors, false, false>), t.grid(), t.block(), stream, p);
  }
}

// T: float, __half or __nv_bfloat16. Nothing is launched for an empty tensor.
template <class T>
void launch_lazy_grad_apply(const LazyGradApplyParams& p, cudaStream_t stream) {
  if (p.extent.rows == 0 || p.extent.channels == 0) return;
  const bool vectors =
      p.extent.channels % kGroup == 0 && aligned(p.g) && aligned(p.z) && aligned(p.residual) && aligned(p.dz);
  vectors ? lazy_grad_apply_select<T, true>(p, stream) : lazy_grad_apply_select<T, false>(p, stream);
}

}  // namespace resnet_fused::cuda
