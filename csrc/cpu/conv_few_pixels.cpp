// With few pixels a convolution takes as long as its weight takes to read. So the weight is read once, in its own
// order: a row of it per output channel, contiguous [C, R, S] or channels_last [R, S, C]. The pixels under it are
// gathered in the same order, one row for each output pixel, and every result is a dot product of two rows. Taps that
// lie in the padding of every pixel are left out where they are runs of memory, in channels_last: of a 3x3 weight on an
// image of one pixel that is all but a ninth.
#include "conv_few_pixels.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <string_view>
#include <vector>

#include "../cpu_levels.h"
#include "panels.h"

namespace resnet_fused::cpu {
namespace {

constexpr int64_t kChannels = 4;     // rows of the weight that are read side by side
constexpr int64_t kWorth = 1 << 16;  // multiply-adds that are worth waking a thread for

constexpr int64_t kRun = 1024;  // elements after which sums are put aside, which bounds their rounding errors

// A run of a weight's row and of a gathered row.
struct Run {
  int64_t weight, pixels, size;
};

// The shape of a convolution and what of a weight's row is read.
struct Convolution : ConvShape {
  std::vector<int64_t> taps;  // those that some pixel meets; all of them where they are not runs
  std::vector<Run> runs;
  int64_t width;  // of a gathered row

  explicit Convolution(const ConvShape& shape) : ConvShape(shape) {
    for (int64_t tap = 0; tap < R * S; ++tap) {
      if (!taps_outside || (is_met(tap / S, P, H, 0) && is_met(tap % S, Q, W, 1))) taps.push_back(tap);
    }
    width = static_cast<int64_t>(taps.size()) * C;
    for (size_t i = 0, end = 0; i < taps.size(); i = end) {
      for (end = i + 1; end < taps.size() && taps[end] == taps[end - 1] + 1;) ++end;
      for (int64_t from = i * C, to = end * C; from < to; from += kRun) {
        const int64_t at = from + (taps[i] - static_cast<int64_t>(i)) * C;
        runs.push_back({at, from, std::min(kRun, to - from)});
      }
    }
  }

  // Whether a gathered row is a pixel of x.
  bool is_pointwise() const { return R * S == 1 && stride[0] * stride[1] == 1 && padding[0] + padding[1] == 0; }

 private:
  bool is_met(int64_t tap, int64_t outputs, int64_t size, int axis) const {
    for (int64_t p = 0; p < outputs; ++p) {
      const int64_t at = p * stride[axis] - padding[axis] + tap * dilation[axis];
      if (at >= 0 && at < size) return true;
    }
    return false;
  }
};

// The pixels under the weight, [pixels, width]; zeros in the padding.
template <class A>
void gather(A* __restrict rows, const A* __restrict x, const Convolution& c) {
  const int64_t taps = static_cast<int64_t>(c.taps.size());
  for (int64_t m = 0; m < c.pixels(); ++m, rows += c.width) {
    const int64_t n = m / (c.P * c.Q), p = m / c.Q % c.P, q = m % c.Q;
    for (int64_t t = 0; t < taps; ++t) {
      const int64_t h = p * c.stride[0] - c.padding[0] + c.taps[t] / c.S * c.dilation[0];
      const int64_t w = q * c.stride[1] - c.padding[1] + c.taps[t] % c.S * c.dilation[1];
      const A* pixel = h >= 0 && h < c.H && w >= 0 && w < c.W ? x + ((n * c.H + h) * c.W + w) * c.C : nullptr;
      A* to = rows + (c.taps_outside ? t * c.C : t);
      const int64_t step = c.taps_outside ? 1 : taps;
      for (int64_t i = 0; i < c.C; ++i) to[i * step] = pixel ? pixel[i] : A(0);
    }
  }
}

template <class A, int64_t kBytes>
struct Register {
  typedef A type __attribute__((vector_size(kBytes), aligned(alignof(A)), may_alias));
};

// Sum of the elements of a register, half onto half.
template <class A, int64_t kBytes>
RESNET_FUSED_INLINE A total(const typename Register<A, kBytes>::type& v) {
  if constexpr (kBytes == sizeof(A)) {
    return v[0];
  } else {
    typename Register<A, kBytes / 2>::type halves[2];
    std::memcpy(halves, &v, kBytes);
    return total<A, kBytes / 2>(halves[0] + halves[1]);
  }
}

// sums[k][m] = dot product of row k of kChannels rows of the weight and row m of `pixels`, for M of them; rows of the
// weight are at w[k]. What will be read `ahead` of them is fetched, since the processor stops ahead of itself at the
// end of each row; 0: nothing. `kBytes`: of a register.
template <class A, int64_t kBytes, int64_t M>
RESNET_FUSED_INLINE void dots(A (&sums)[kChannels][4], const A* const* w, int64_t ahead, const A* __restrict pixels,
                              int64_t width, const std::vector<Run>& runs) {
  using Vector = typename Register<A, kBytes>::type;
  constexpr int64_t kLanes = kBytes / sizeof(A);
  Vector totals[kChannels][M] = {};
  A tails[kChannels][M] = {};
  for (const Run& run : runs) {
    Vector parts[kChannels][M] = {};
    int64_t i = 0;
    for (; i + kLanes <= run.size; i += kLanes) {
      Vector under[M];
#pragma GCC unroll 4
      for (int64_t m = 0; m < M; ++m) under[m] = *reinterpret_cast<const Vector*>(pixels + m * width + run.pixels + i);
#pragma GCC unroll 4
      for (int64_t k = 0; k < kChannels; ++k) {
        const Vector row = *reinterpret_cast<const Vector*>(w[k] + run.weight + i);
        if (ahead) __builtin_prefetch(w[k] + ahead + run.weight + i, 0, 2);
#pragma GCC unroll 4
        for (int64_t m = 0; m < M; ++m) parts[k][m] += row * under[m];
      }
    }
    for (int64_t k = 0; k < kChannels; ++k) {
      for (int64_t m = 0; m < M; ++m) totals[k][m] += parts[k][m];
    }
    for (; i < run.size; ++i) {
      for (int64_t k = 0; k < kChannels; ++k) {
        for (int64_t m = 0; m < M; ++m) tails[k][m] += w[k][run.weight + i] * pixels[m * width + run.pixels + i];
      }
    }
  }
  for (int64_t k = 0; k < kChannels; ++k) {
    for (int64_t m = 0; m < M; ++m) {
      sums[k][m] = tails[k][m] + total<A, kBytes>(totals[k][m]);
    }
  }
}

// Output channels [k, k + kChannels), as far as there are so many, of all pixels. `kPixels`: at a time.
template <class A, int64_t kBytes, int64_t kPixels>
RESNET_FUSED_CLONES void channels(A* out, const A* weight, const A* pixels, const Convolution& c,
                                  const Behind<A>& behind, int64_t k) {
  const int64_t there = std::min(kChannels, c.K - k);
  const A* w[kChannels];
  A scale[kChannels], shift[kChannels], sums[kChannels][4];
  for (int64_t i = 0; i < kChannels; ++i) {
    const int64_t own = k + std::min(i, there - 1);  // beyond the last, the last again
    w[i] = weight + own * c.R * c.S * c.C;
    behind.affine(own, scale[i], shift[i]);
  }
  const int64_t next = k + 2 * kChannels <= c.K ? kChannels * c.R * c.S * c.C : 0;
  for (int64_t m = 0, M = c.pixels(), some = 0; m < M; m += some) {
    const int64_t ahead = m == 0 ? next : 0;
    some = M - m >= kPixels ? kPixels : M - m >= 2 ? 2 : 1;
    const A* rows = pixels + m * c.width;
    if (some == kPixels) {
      dots<A, kBytes, kPixels>(sums, w, ahead, rows, c.width, c.runs);
    } else if (some == 2) {
      dots<A, kBytes, 2>(sums, w, ahead, rows, c.width, c.runs);
    } else {
      dots<A, kBytes, 1>(sums, w, ahead, rows, c.width, c.runs);
    }
    for (int64_t j = 0; j < some; ++j) {
      for (int64_t i = 0; i < there; ++i) {
        const int64_t at = (m + j) * c.K + k + i;
        A y = sums[i][j] * scale[i] + shift[i];
        if (behind.residual) y += behind.residual[at];
        out[at] = behind.relu && y < A(0) ? A(0) : y;
      }
    }
  }
}

}  // namespace

template <class A>
void convolve_few_pixels(A* out, const A* x, const A* weight, const ConvShape& shape, const Behind<A>& behind) {
  static const bool wide = std::string_view(cpu_level()) == "avx512";
  const auto one = wide ? channels<A, 64, 4> : channels<A, 32, 2>;
  const Convolution c(shape);
  AlignedArray<A> gathered;
  if (!c.is_pointwise()) {
    gathered = aligned_array<A>(c.pixels() * c.width + 1);
    gather(gathered.get(), x, c);
  }
  const A* pixels = gathered ? gathered.get() : x;
  const int64_t blocks = (c.K + kChannels - 1) / kChannels, work = kChannels * c.width * c.pixels();
  torch::stable::parallel_for(0, blocks, std::max<int64_t>(1, kWorth / std::max<int64_t>(work, 1)),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t b = begin; b < end; ++b)
                                  one(out, weight, pixels, c, behind, b * kChannels);
                              });
}

template void convolve_few_pixels(float*, const float*, const float*, const ConvShape&, const Behind<float>&);
template void convolve_few_pixels(double*, const double*, const double*, const ConvShape&, const Behind<double>&);

}  // namespace resnet_fused::cpu
