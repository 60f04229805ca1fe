// Normalise, clamp and average: one read of x, one write of the averages.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "../checks/norm_relu_avg_pool.h"
#include "alloc.h"
#include "average_pool.h"

namespace resnet_fused::cpu {
namespace {

constexpr int kGroup = 4;  // places added up at a time

// sum[c] = (more ? sum[c] : 0) + relu(scale*x + shift) of some pixels. NaN passes.
template <class T, bool more, class A, size_t... t>
RESNET_FUSED_INLINE void add(A* __restrict sum, const T* const* pixels, const A* __restrict scale,
                             const A* __restrict shift, int64_t C, std::index_sequence<t...>) {
  const T* const x[] = {pixels[t]...};
  for (int64_t c = 0; c < C; ++c) {
    const A y[] = {load(x[t] + c) * scale[c] + shift[c]...};
    const A some = (... + (y[t] < 0 ? A(0) : y[t]));
    sum[c] = more ? sum[c] + some : some;
  }
}

template <class T, int count, class A>
RESNET_FUSED_INLINE void add(A* sum, const T* const* pixels, bool more, const A* scale, const A* shift, int64_t C) {
  const auto each = std::make_index_sequence<count>();
  more ? add<T, true>(sum, pixels, scale, shift, C, each) : add<T, false>(sum, pixels, scale, shift, C, each);
}

// One row of windows. x: the first pixel of the first window, sum: scratch [C].
template <class T, class A = acc_t<T>>
RESNET_FUSED_CLONES void average_row(T* __restrict out, const T* x, const PoolShape& shape, int64_t pitch,
                                     const A* __restrict scale, const A* __restrict shift, A* __restrict sum) {
  const int64_t C = shape.channels;
  const A inverse = A(1) / static_cast<A>(shape.h.kernel * shape.w.kernel);
  const T* pixels[kGroup];
  for (int64_t o = 0; o < shape.w.windows; ++o, out += C, x += shape.w.stride * pitch) {
    int count = 0;
    bool more = false;
    for (int64_t r = 0; r < shape.h.kernel; ++r) {
      for (int64_t s = 0; s < shape.w.kernel; ++s) {
        pixels[count] = x + (r * shape.w.size + s) * pitch;
        if (++count < kGroup) continue;
        add<T, kGroup>(sum, pixels, more, scale, shift, C);
        more = true;
        count = 0;
      }
    }
    switch (count) {
      case 0: break;
      case 1: add<T, 1>(sum, pixels, more, scale, shift, C); break;
      case 2: add<T, 2>(sum, pixels, more, scale, shift, C); break;
      default: add<T, 3>(sum, pixels, more, scale, shift, C);
    }
    for (int64_t c = 0; c < C; ++c) store(out + c, sum[c] * inverse);
  }
}

template <class T>
void run(const PoolShape& shape, const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& out) {
  using A = acc_t<T>;
  const PoolAxis &h = shape.h, &w = shape.w;
  const int64_t pitch = pixel_pitch(x), out_row = w.windows * shape.channels;
  const int64_t grain = std::max<int64_t>(1, 32768 / (out_row * h.kernel * w.kernel));
  torch::stable::parallel_for(0, shape.samples * h.windows, grain, [&](int64_t begin, int64_t end) {
    std::vector<A> sum(shape.channels);
    for (int64_t y = begin; y < end; ++y) {
      const int64_t row = y / h.windows * h.size + h.start(y % h.windows);  // of x, the topmost under these windows
      average_row<T>(data<T>(out) + y * out_row, data<T>(x) + row * w.size * pitch, shape, pitch, data<A>(scale),
                     data<A>(shift), sum.data());
    }
  });
}

Tensor norm_relu_avg_pool(const Tensor& x, const Tensor& scale, const Tensor& shift, const std::vector<int64_t>& kernel,
                          const std::vector<int64_t>& stride) {
  check_norm_relu_avg_pool(x, scale, shift, kernel, stride);
  const PoolShape shape = averaged_shape(x, kernel, stride);
  const Tensor out = shape.empty_pooled(x.scalar_type());
  for_element_type(x.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    run<T>(shape, x, scale, shift, out);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { m.impl("norm_relu_avg_pool", TORCH_BOX(&norm_relu_avg_pool)); }

}  // namespace resnet_fused::cpu
