// Convolution of few pixels with the weight as its module keeps it; batch norm, sum and ReLU on the accumulator.
//
// With few pixels a convolution takes as long as its weight takes to read. So the weight is read once, in its own
// order: a row of it per output channel, contiguous [C, R, S] or channels_last [R, S, C]. The pixels under it are
// gathered in the same order, one row for each output pixel, and every result is a dot product of two rows. Taps that
// lie in the padding of every pixel are left out where they are runs of memory, in channels_last: of a 3x3 weight on an
// image of one pixel that is all but a ninth.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../checks/conv_norm_add_relu.h"
#include "alloc.h"
#include "behind_conv.h"
#include "conv_pointwise.h"
#include "panels.h"
#include "rows.h"

namespace resnet_fused::cpu {
namespace {

constexpr int64_t kChannels = 4;     // rows of the weight that are read side by side
constexpr int64_t kWorth = 1 << 16;  // multiply-adds that are worth waking a thread for

constexpr int64_t kRun = 1024;  // elements after which sums are put aside, which bounds their rounding errors

// A run of a weight's row and of a gathered row.
struct Run {
  int64_t weight, pixels, size;
};

struct Convolution {
  int64_t N, C, H, W, K, R, S, P, Q, stride[2], padding[2], dilation[2];
  bool taps_outside;          // channels_last, or 1x1: the taps of a row are runs of C
  std::vector<int64_t> taps;  // those that some pixel meets; all of them where they are not runs
  std::vector<Run> runs;
  int64_t width;  // of a gathered row

  Convolution(const Tensor& x, const Tensor& weight, const std::vector<int64_t>& st, const std::vector<int64_t>& pad,
              const std::vector<int64_t>& dil)
      : N(x.size(0)),
        C(x.size(1)),
        H(x.size(2)),
        W(x.size(3)),
        K(weight.size(0)),
        R(weight.size(2)),
        S(weight.size(3)),
        stride{st[0], st[1]},
        padding{pad[0], pad[1]},
        dilation{dil[0], dil[1]},
        taps_outside(is_channels_last(weight)) {
    P = (H + 2 * padding[0] - dilation[0] * (R - 1) - 1) / stride[0] + 1;
    Q = (W + 2 * padding[1] - dilation[1] * (S - 1) - 1) / stride[1] + 1;
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

  int64_t pixels() const { return N * P * Q; }

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

template <class A>
void run(const Tensor& out, const Tensor& x, const Tensor& weight, const Convolution& c, const Behind<A>& behind) {
  static const bool wide = std::string(cpu_level()) == "avx512";
  const auto one = wide ? channels<A, 64, 4> : channels<A, 32, 2>;
  AlignedArray<A> gathered;
  if (!c.is_pointwise()) {
    gathered = aligned_array<A>(c.pixels() * c.width + 1);
    gather(gathered.get(), data<A>(x), c);
  }
  const A* pixels = gathered ? gathered.get() : data<A>(x);
  const int64_t blocks = (c.K + kChannels - 1) / kChannels, work = kChannels * c.width * c.pixels();
  torch::stable::parallel_for(0, blocks, std::max<int64_t>(1, kWorth / std::max<int64_t>(work, 1)),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t b = begin; b < end; ++b) {
                                  one(data<A>(out), data<A>(weight), pixels, c, behind, b * kChannels);
                                }
                              });
}

// Everything behind the convolution but the residual, as tensors.
struct Vectors {
  const OptionalTensor &bias, &mean, &var, &gamma, &beta;
  double eps;
};

template <class A>
void compute_as(const Tensor& out, const Tensor& x, const Tensor& weight, const Convolution& c, const Vectors& v,
                const Tensor* residual, bool relu) {
  const Behind<A> behind{data<A>(v.bias), data<A>(v.mean), data<A>(v.var), data<A>(v.gamma),
                         data<A>(v.beta), residual ? data<A>(*residual) : nullptr, A(v.eps), relu};
  if constexpr (std::is_same_v<A, float>) {
      static const int64_t from = getenv("FROM") ? atoll(getenv("FROM")) : 17;
    if (c.R * c.S == 1 && c.padding[0] + c.padding[1] == 0 && c.pixels() >= from) {
      return run_pointwise({data<A>(x), data<A>(weight), data<A>(out), c.C, c.K, Pixels(x, {c.stride[0], c.stride[1]}), behind});
    }
  }
  run<A>(out, x, weight, c, behind);
}

void compute(const Tensor& out, const Tensor& x, const Tensor& weight, const Convolution& c, const Vectors& v,
             const Tensor* residual, bool relu) {
  if (out.numel() == 0) return;
  const auto as = x.scalar_type() == ScalarType::Double ? compute_as<double> : compute_as<float>;
  as(out, x, weight, c, v, residual, relu);
}

Tensor conv_norm_add_relu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& mean,
                          const OptionalTensor& var, const OptionalTensor& gamma, const OptionalTensor& beta,
                          double eps, const OptionalTensor& residual, std::vector<int64_t> stride,
                          std::vector<int64_t> padding, std::vector<int64_t> dilation, bool relu) {
  const char* op = "conv_norm_add_relu";
  check_conv_norm_add_relu(op, x, weight, stride, padding, dilation);
  const Convolution c(x, weight, stride, padding, dilation);
  Tensor out = empty_images(c.N, c.K, c.P, c.Q, x.scalar_type());
  check_behind_conv(op, out, bias, mean, var, gamma, beta, residual);
  advise_huge_pages(out.mutable_data_ptr(), static_cast<size_t>(out.numel()) * out.element_size());
  compute(out, x, weight, c, {bias, mean, var, gamma, beta, eps}, residual ? &*residual : nullptr, relu);
  return out;
}

void conv_norm_add_relu_(const Tensor& out, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& mean, const OptionalTensor& var, const OptionalTensor& gamma,
                         const OptionalTensor& beta, double eps, const OptionalTensor& residual,
                         std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                         bool relu, bool adds) {
  const char* op = "conv_norm_add_relu_";
  check_conv_norm_add_relu(op, x, weight, stride, padding, dilation);
  const Convolution c(x, weight, stride, padding, dilation);
  check_target(op, out, x, {c.N, c.K, c.P, c.Q});
  if (adds && residual) fail(op, ": got a residual where out itself is one; pass either");
  check_behind_conv(op, out, bias, mean, var, gamma, beta, residual);
  compute(out, x, weight, c, {bias, mean, var, gamma, beta, eps}, adds ? &out : residual ? &*residual : nullptr, relu);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("conv_norm_add_relu", TORCH_BOX(&conv_norm_add_relu));
  m.impl("conv_norm_add_relu_", TORCH_BOX(&conv_norm_add_relu_));
}

}  // namespace resnet_fused::cpu
