// The sums of batch norm's backward behind an activation: one read of grad_out and z.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "../checks/norm_act_backward.h"
#include "activation.h"
#include "alloc.h"
#include "rows.h"

namespace resnet_fused::cpu {
namespace {

template <class A>
struct Vectors {
  const A *mean, *scale, *shift;  // [C] each
};

template <class T, Act act, class A = acc_t<T>>
RESNET_FUSED_CLONES void through(A* __restrict g, const T* __restrict grad, const T* __restrict z,
                                 const A* __restrict scale, const A* __restrict shift, A slope, int64_t rows,
                                 int64_t C) {
  for (int64_t m = 0; m < rows; ++m, g += C, grad += C, z += C) {
    for (int64_t c = 0; c < C; ++c) {
      g[c] = activation_gradient<act>(A(load(grad + c)), load(z + c) * scale[c] + shift[c], slope);
    }
  }
}

// Sums over rows, [C] each, of g and of g * (z - mean); few rows, so float32 holds them well.
template <class T, class A>
RESNET_FUSED_CLONES void sum_rows(A* __restrict sum_g, A* __restrict sum_gz, const A* __restrict g,
                                  const T* __restrict z, const A* __restrict mean, int64_t rows, int64_t C) {
  for (int64_t c = 0; c < C; ++c) sum_g[c] = sum_gz[c] = 0;
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4, g += 4 * C, z += 4 * C) {
    for (int64_t c = 0; c < C; ++c) {
      const A g0 = g[c], g1 = g[C + c], g2 = g[2 * C + c], g3 = g[3 * C + c];
      const A z0 = load(z + c) - mean[c], z1 = load(z + C + c) - mean[c];
      const A z2 = load(z + 2 * C + c) - mean[c], z3 = load(z + 3 * C + c) - mean[c];
      sum_g[c] += (g0 + g1) + (g2 + g3);
      sum_gz[c] += (g0 * z0 + g1 * z1) + (g2 * z2 + g3 * z3);
    }
  }
  for (; m < rows; ++m, g += C, z += C) {
    for (int64_t c = 0; c < C; ++c) {
      sum_g[c] += g[c];
      sum_gz[c] += g[c] * (load(z + c) - mean[c]);
    }
  }
}

template <class A>
RESNET_FUSED_CLONES void add_to(double* __restrict totals, const A* __restrict sums, int64_t count) {
  for (int64_t i = 0; i < count; ++i) totals[i] += sums[i];
}

template <class T, Act act>
void run(const Tensor& grad_out, const Tensor& z, const Vectors<acc_t<T>>& v, acc_t<T> slope, Tensor& sum_g,
         Tensor& sum_gz) {
  using A = acc_t<T>;
  const Shape shape(z);
  const Partition part(shape);
  const int64_t C = shape.channels, step = std::max<int64_t>(4, 4096 / std::max<int64_t>(C, 1) / 4 * 4);
  std::vector<double> totals(std::max<int64_t>(part.chunks, 1) * 2 * C);  // [chunks, 2, C]
  torch::stable::parallel_for(0, part.chunks, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> g(step * C), sums(2 * C);  // both stay in the first-level cache
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      part.for_each_block(chunk, [&](int64_t first, int64_t stop) {
        for (int64_t row = first; row < stop; row += step) {
          const int64_t rows = std::min(step, stop - row);
          const T* from = data<T>(z) + row * C;
          through<T, act>(g.data(), data<T>(grad_out) + row * C, from, v.scale, v.shift, slope, rows, C);
          sum_rows<T, A>(&sums[0], &sums[C], g.data(), from, v.mean, rows, C);
          add_to<A>(&totals[chunk * 2 * C], sums.data(), 2 * C);
        }
      });
    }
  });
  for (int64_t chunk = 1; chunk < part.chunks; ++chunk) add_to<double>(&totals[0], &totals[chunk * 2 * C], 2 * C);
  for (int64_t c = 0; c < C; ++c) {
    data<A>(sum_g)[c] = static_cast<A>(totals[c]);
    data<A>(sum_gz)[c] = static_cast<A>(totals[C + c]);
  }
}

std::tuple<Tensor, Tensor> norm_act_backward(const Tensor& grad_out, const Tensor& z, const Tensor& mean,
                                             const Tensor& scale, const Tensor& shift, int64_t act, double slope) {
  check_norm_act_backward(grad_out, z, mean, scale, shift, act);
  Tensor sum_g = empty_stats(z), sum_gz = empty_stats(z);
  for_element_type(z.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using A = acc_t<T>;
    const Vectors<A> v{data<A>(mean), data<A>(scale), data<A>(shift)};
    for_act(act, [&](auto code) { run<T, code()>(grad_out, z, v, A(slope), sum_g, sum_gz); });
  });
  return {sum_g, sum_gz};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { m.impl("norm_act_backward", TORCH_BOX(&norm_act_backward)); }

}  // namespace resnet_fused::cpu
