// out = max_pool2d(relu(scale*z + shift)), and the winners' places: a thread takes eight channels of a window.
//
// Bytes per element of z of b bytes, for 3x3 windows of stride 2: reads z (b), writes out (b/4) and index (1/4). A
// pixel is loaded by each window over it, 9/4 times; all but the first come from L1 or L2, as a block takes windows
// side by side. The stem of ResNet-50, bf16 [256, 64, 112, 112], moves 206 M elements * 2.75 bytes = 565 MB: at least
// 0.17 ms at the 3.35 TB/s of an H100.
#pragma once

#include "pool.cuh"

namespace resnet_fused::cuda {

// What leads in a window; every activation is above what it starts with.
struct Winners {
  float best[kGroup];
  int place[kGroup];

  __device__ Winners() {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      best[i] = -1.f;
      place[i] = 0;
    }
  }

  // Stock's rule: a later one wins if it is greater or NaN; rounded to T first, which decides who is equal.
  template <class T>
  __device__ void challenge(const Group<T>& z, const float (&scale)[kGroup], const float (&shift)[kGroup], int at) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      float y = fmaf(scale[i], to_float(z.v[i]), shift[i]);
      if (y < 0.f) y = 0.f;  // not fmaxf, which would drop NaN
      y = to_float(from_float<T>(y));
      if (y > best[i] || y != y) {
        best[i] = y;
        place[i] = at;
      }
    }
  }
};

// kWidth: of the windows, whose columns are loaded at once; 0: any.
template <class T, bool kVectors, int kWidth>
__global__ void __launch_bounds__(kThreads, 2) norm_relu_pool_kernel(const NormReluPoolParams p) {
  const PoolAxis &h = p.geometry.h, &w = p.geometry.w;
  const int64_t channels = p.geometry.channels, rows = p.geometry.samples * h.windows * w.windows;
  const Channels c = my_channels(channels);
  if (c.count == 0) return;
  float scale[kGroup], shift[kGroup];
  load_coefficients(scale, p.scale, c, 0.f);
  load_coefficients(shift, p.shift, c, 0.f);
  PixelWalk at(first_row(), row_step(), h.windows, w.windows);
  for (int64_t row = first_row(); row < rows; row += row_step(), at.advance()) {
    const int top = at.h * h.stride - h.padding, left = at.w * w.stride - w.padding;
    const int bottom = h.kernel < h.size - top ? h.kernel : h.size - top;
    Winners winners;
    for (int r = top < 0 ? -top : 0; r < bottom; ++r) {
      const int64_t first = (at.sample * h.size + top + r) * w.size + left;
      if constexpr (kWidth > 0) {
        Group<T> z[kWidth];
#pragma unroll
        for (int s = 0; s < kWidth; ++s) {
          z[s] = load_if<kVectors, T>(left + s >= 0 && left + s < w.size, p.z, first + s, channels, c);
        }
#pragma unroll
        for (int s = 0; s < kWidth; ++s) {
          if (left + s >= 0 && left + s < w.size) winners.challenge(z[s], scale, shift, r * kWidth + s);
        }
      } else {
        const int right = w.kernel < w.size - left ? w.kernel : w.size - left;
        for (int s = left < 0 ? -left : 0; s < right; ++s) {
          winners.challenge(load<kVectors, T>(p.z, first + s, channels, c), scale, shift, r * w.kernel + s);
        }
      }
    }
    Group<T> out;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) out.v[i] = from_float<T>(winners.best[i]);
    store<kVectors, T>(p.out, row, channels, c, out);
    store_places<kVectors>(p.index, row, channels, c, winners.place);
  }
}

inline Tiling norm_relu_pool_tiling(const PoolGeometry& g) { return Tiling(windows_of(g), 8192, 4); }

template <class T, bool kVectors>
void norm_relu_pool_select(const NormReluPoolParams& p, cudaStream_t stream) {
  const Tiling t = norm_relu_pool_tiling(p.geometry);
  if (p.geometry.w.kernel == 3) {
    RESNET_FUSED_LAUNCH((norm_relu_pool_kernel<T, kVectors, 3>), t.grid(), t.block(), stream, p);
  } else {
    RESNET_FUSED_LAUNCH((norm_relu_pool_kernel<T, kVectors, 0>), t.grid(), t.block(), stream, p);
  }
}

// T: float, __half or __nv_bfloat16. Nothing is launched for an empty tensor.
template <class T>
void launch_norm_relu_pool(const NormReluPoolParams& p, cudaStream_t stream) {
  const int64_t channels = p.geometry.channels;
  if (p.geometry.samples == 0 || channels == 0) return;
  const bool vectors = channels % kGroup == 0 && aligned(p.z) && aligned(p.out) && aligned(p.index);
  vectors ? norm_relu_pool_select<T, true>(p, stream) : norm_relu_pool_select<T, false>(p, stream);
}

}  // namespace resnet_fused::cuda
