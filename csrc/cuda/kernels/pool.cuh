// What the kernels of the stem's pooling share: which windows lie over a pixel, the places of winners, eight channels
// at a time, and the gradient that a pixel gathers.
#pragma once

#include "fold.cuh"

namespace resnet_fused::cuda {

inline Extent pixels_of(const PoolGeometry& g) {
  const int64_t image = static_cast<int64_t>(g.h.size) * g.w.size;
  return {g.samples * image, g.channels, image};
}
inline Extent windows_of(const PoolGeometry& g) {
  const int64_t image = static_cast<int64_t>(g.h.windows) * g.w.windows;
  return {g.samples * image, g.channels, image};
}

// n / divisor for 0 <= n < 2^31, exactly, by a product and a shift (Granlund and Montgomery 1994): GPUs have no
// instruction for it.
struct Divisor {
  unsigned multiplier;
  int bits = 31;

  explicit Divisor(int divisor) {
    while ((int64_t(1) << (bits - 31)) < divisor) ++bits;
    multiplier = static_cast<unsigned>(((uint64_t(1) << bits) + divisor - 1) / divisor);
  }
  __device__ int divide(int n) const { return static_cast<int>(static_cast<uint64_t>(n) * multiplier >> bits); }
};

// The strides of a pooling.
struct PoolStrides {
  Divisor h, w;
  explicit PoolStrides(const PoolGeometry& g) : h(g.h.stride), w(g.w.stride) {}
};

// Where a row of [samples, height, width] lies, and those that a thread visits after it, which are `step` apart:
// indices are divided once.
struct PixelWalk {
  int64_t sample;
  int h, w;

  __device__ PixelWalk(int64_t row, int64_t step, int height, int width)
      : sample(row / width / height),
        h(static_cast<int>(row / width % height)),
        w(static_cast<int>(row % width)),
        samples_(step / width / height),
        rows_(static_cast<int>(step / width % height)),
        columns_(static_cast<int>(step % width)),
        height_(height),
        width_(width) {}
  __device__ void advance() {
    sample += samples_;
    h += rows_;
    w += columns_;
    if (w >= width_) {
      w -= width_;
      ++h;
    }
    if (h >= height_) {
      h -= height_;
      ++sample;
    }
  }

 private:
  int64_t samples_;
  int rows_, columns_, height_, width_;
};

// Eight channels' places in a window, channel i's in byte i.
template <bool kVectors>
__device__ inline uint64_t load_places(const uint8_t* index, int64_t row, int64_t row_channels, Channels c) {
  const uint8_t* p = index + row * row_channels + c.first;
  if constexpr (kVectors) return *reinterpret_cast<const uint64_t*>(p);
  uint64_t places = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) places |= static_cast<uint64_t>(i < c.count ? p[i] : 0) << 8 * i;
  return places;
}

template <bool kVectors>
__device__ inline void store_places(uint8_t* index, int64_t row, int64_t row_channels, Channels c,
                                    const int (&place)[kGroup]) {
  uint8_t* p = index + row * row_channels + c.first;
  uint64_t places = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    if constexpr (kVectors) {
      places |= static_cast<uint64_t>(place[i]) << 8 * i;
    } else if (i < c.count) {
      p[i] = static_cast<uint8_t>(place[i]);
    }
  }
  if constexpr (kVectors) *reinterpret_cast<uint64_t*>(p) = places;
}

// A gradient at pooled windows, and the places of the winners there.
struct PooledGradient {
  const void* grad_out;
  const uint8_t* index;
};

// g = what the windows over the pixel that `at` stands on send there: those whose index is its place. The last windows
// come first, so that places ascend. A select: the NaN of another's gradient stays out.
template <class T, bool kVectors>
__device__ inline void gather_pooled(float (&g)[kGroup], const PooledGradient& from, const PoolGeometry& p,
                                     const PoolStrides& by, const PixelWalk& at, Channels c) {
#pragma unroll
  for (int i = 0; i < kGroup; ++i) g[i] = 0.f;
  const int padded_h = at.h + p.h.padding, padded_w = at.w + p.w.padding;
  const int last_h = by.h.divide(padded_h), last_w = by.w.divide(padded_w);
  int r = padded_h - last_h * p.h.stride;
  for (int window_h = last_h; window_h >= 0 && r < p.h.kernel; --window_h, r += p.h.stride) {
    if (window_h >= p.h.windows) continue;
    const int64_t first = (at.sample * p.h.windows + window_h) * p.w.windows;
    int s = padded_w - last_w * p.w.stride;
    for (int window_w = last_w; window_w >= 0 && s < p.w.kernel; --window_w, s += p.w.stride) {
      if (window_w >= p.w.windows) continue;
      const uint64_t places = load_places<kVectors>(from.index, first + window_w, p.channels, c);
      const Group<T> grad = load<kVectors, T>(from.grad_out, first + window_w, p.channels, c);
      const unsigned place = r * p.w.kernel + s;
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if ((places >> 8 * i & 0xFF) == place) g[i] += to_float(grad.v[i]);
      }
    }
  }
}

// The same behind the ReLU: 0 where scale*z + shift <= 0. fmaf as in the forward, whose sign this is.
template <class T>
__device__ inline void mask_by_sign(float (&g)[kGroup], const Group<T>& z, const float (&scale)[kGroup],
                                    const float (&shift)[kGroup]) {
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    if (fmaf(scale[i], to_float(z.v[i]), shift[i]) <= 0.f) g[i] = 0.f;
  }
}

}  // namespace resnet_fused::cuda
