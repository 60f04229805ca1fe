// out = relu(sample_factor * (scale*z + shift) + residual'), residual' raw or itself scale*residual + shift, and its
// packed sign mask: one pass.
//
// Bytes per element of b bytes: reads z (b) and residual (b), writes out (b) and the mask (1/8); coefficients are read
// once per thread and stay in registers. The largest join of ResNet-50, bf16 [256, 256, 56, 56] with residual and mask,
// moves 206 M elements * 6.125 bytes = 1.26 GB: at least 0.38 ms at the 3.35 TB/s of an H100. About one flop per byte,
// so memory is all that counts.
#pragma once

#include "tile.cuh"

namespace resnet_fused::cuda {

enum class Residual { kNone, kPlain, kAffine };

template <class T, bool kVectors, Residual kResidual>
__global__ void __launch_bounds__(kThreads) norm_add_relu_kernel(const NormAddReluParams p) {
  const Channels c = my_channels(p.extent.channels);
  if (c.count == 0) return;
  const int64_t mask_bytes = (p.extent.channels + 7) / 8;
  float scale[kGroup], shift[kGroup], residual_scale[kGroup], residual_shift[kGroup];
  load_coefficients(scale, p.scale, c, 0.f);
  load_coefficients(shift, p.shift, c, 0.f);
  if constexpr (kResidual == Residual::kAffine) {
    load_coefficients(residual_scale, p.residual_scale, c, 0.f);
    load_coefficients(residual_shift, p.residual_shift, c, 0.f);
  }
  for (int64_t row = first_row(); row < p.extent.rows; row += row_step()) {
    Group<T> group = load<kVectors, T>(p.z, row, p.extent.channels, c);
    Group<T> residual;
    if constexpr (kResidual != Residual::kNone) residual = load<kVectors, T>(p.residual, row, p.extent.channels, c);
    const float factor = p.sample_factor ? p.sample_factor[row / p.extent.rows_per_sample] : 1.f;
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      // fmaf by name: the backward recomputes this sign and must round alike
      float y = factor * fmaf(scale[i], to_float(group.v[i]), shift[i]);
      if constexpr (kResidual == Residual::kPlain) y += to_float(residual.v[i]);
      if constexpr (kResidual == Residual::kAffine) {
        y += fmaf(residual_scale[i], to_float(residual.v[i]), residual_shift[i]);
      }
      if (p.relu && y < 0.f) y = 0.f;  // not fmaxf, which would drop NaN
      group.v[i] = from_float<T>(y);
      if (i < c.count && !(to_float(group.v[i]) <= 0.f)) bits |= 1u << i;
    }
    store<kVectors, T>(p.out, row, p.extent.channels, c, group);
    if (p.mask) p.mask[row * mask_bytes + c.first / 8] = static_cast<uint8_t>(bits);
  }
}

// Enough blocks for any GPU to be full several times over, few enough that coefficients are read seldom.
inline Tiling norm_add_relu_tiling(const Extent& extent) { return Tiling(extent, 8192, 4); }

template <class T, bool kVectors>
void norm_add_relu_select(const NormAddReluParams& p, cudaStream_t stream) {
  const Tiling t = norm_add_relu_tiling(p.extent);
  if (!p.residual) {
    RESNET_FUSED_LAUNCH((norm_add_relu_kernel<T, kVectors, Residual::kNone>), t.grid(), t.block(), stream, p);
  } else if (!p.residual_scale) {
    RESNET_FUSED_LAUNCH((norm_add_relu_kernel<T, kVectors, Residual::kPlain>), t.grid(), t.block(), stream, p);
  } else {
    RESNET_FUSED_LAUNCH((norm_add_relu_kernel<T, kVectors, Residual::kAffine>), t.grid(), t.block(), stream, p);
  }
}

// T: float, __half or __nv_bfloat16. Nothing is launched for an empty tensor.
template <class T>
void launch_norm_add_relu(const NormAddReluParams& p, cudaStream_t stream) {
  if (p.extent.rows == 0 || p.extent.channels == 0) return;
  const bool vectors = p.extent.channels % kGroup == 0 && aligned(p.z) && aligned(p.residual) && aligned(p.out);
  vectors ? norm_add_relu_select<T, true>(p, stream) : norm_add_relu_select<T, false>(p, stream);
}

}  // namespace resnet_fused::cuda
