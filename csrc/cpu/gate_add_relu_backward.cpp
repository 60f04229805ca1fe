// Mask the gradient and sum its products for each sample and channel: one read of everything given, one write of g.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "../checks/gate_add_relu_backward.h"
#include "alloc.h"
#include "rows.h"

namespace resnet_fused::cpu {
namespace {

struct Arguments {
  Tensor grad_out, z;
  std::optional<Tensor> out;
  Tensor g, sum_gz;
};

// g = not (out <= 0) ? grad : 0, a select: NaN vanishes too.
template <bool masked, class T>
RESNET_FUSED_INLINE acc_t<T> kept(const T* grad, const T* out) {
  if constexpr (!masked) return load(grad);
  return !(load(out) <= 0) ? load(grad) : acc_t<T>(0);
}

// sum[c] += g*z over rows; few enough for sums in the accumulation type.
template <class T, bool masked, class A = acc_t<T>>
RESNET_FUSED_CLONES void mask_and_sum(T* __restrict g, A* __restrict sum, const T* __restrict grad,
                                      const T* __restrict out, const T* __restrict z, int64_t rows, int64_t C) {
  int64_t m = 0;
  for (; m + 2 <= rows; m += 2, g += 2 * C, grad += 2 * C, z += 2 * C, out += masked ? 2 * C : 0) {
    for (int64_t c = 0; c < C; ++c) {
      const A g0 = kept<masked>(grad + c, out + c), g1 = kept<masked>(grad + C + c, out + C + c);
      store(g + c, g0);
      store(g + C + c, g1);
      sum[c] += g0 * load(z + c) + g1 * load(z + C + c);
    }
  }
  for (; m < rows; ++m, g += C, grad += C, z += C, out += masked ? C : 0) {
    for (int64_t c = 0; c < C; ++c) {
      const A value = kept<masked>(grad + c, out + c);
      store(g + c, value);
      sum[c] += value * load(z + c);
    }
  }
}

template <class T, bool masked>
void run(const Arguments& a) {
  using A = acc_t<T>;
  Shape image(a.grad_out);
  const int64_t samples = a.grad_out.size(0), C = image.channels;
  image.rows = image.rows_per_sample;
  const Partition part(image);                            // of one sample: results depend on the shape alone
  std::vector<double> totals(samples * part.chunks * C);  // [samples, chunks, C]
  torch::stable::parallel_for(0, samples * part.chunks, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> sums(C);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t offset = unit / part.chunks * image.rows;
      part.for_each_block(unit % part.chunks, [&](int64_t first, int64_t stop) {
        const int64_t at = (offset + first) * C;
        std::fill(sums.begin(), sums.end(), A(0));
        mask_and_sum<T, masked>(data<T>(a.g) + at, sums.data(), data<T>(a.grad_out) + at,
                                masked ? data<T>(a.out) + at : nullptr, data<T>(a.z) + at, stop - first, C);
        for (int64_t c = 0; c < C; ++c) totals[unit * C + c] += sums[c];
      });
    }
  });
  for (int64_t i = 0; i < samples * C; ++i) {
    double total = 0;
    for (int64_t chunk = 0; chunk < part.chunks; ++chunk) total += totals[(i / C * part.chunks + chunk) * C + i % C];
    data<A>(a.sum_gz)[i] = static_cast<A>(total);
  }
}

std::tuple<Tensor, Tensor> gate_add_relu_backward(const Tensor& grad_out, const Tensor& z,
                                                  const std::optional<Tensor>& out) {
  check_gate_add_relu_backward(grad_out, z, out);
  const int64_t samples = grad_out.size(0), C = grad_out.size(1);
  const Arguments a{grad_out, z, out, empty_channels_last(grad_out),
                    empty_strided<2>({samples, C}, {C, 1}, stat_dtype(grad_out.scalar_type()))};
  for_element_type(grad_out.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    out ? run<T, true>(a) : run<T, false>(a);
  });
  return {a.g, a.sum_gz};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("gate_add_relu_backward", TORCH_BOX(&gate_add_relu_backward));
}

}  // namespace resnet_fused::cpu
