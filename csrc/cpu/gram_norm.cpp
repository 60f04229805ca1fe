// Batch statistics of a 1x1 convolution's output from the Gram matrix of its input: a few loops instead of many calls.
//
// The covariance is packed once in float64 arithmetic. Then blocks of rows of W are multiplied with it in registers,
// and each row's two sums are taken in float64 while the product is in cache. W is read once; FLOPs: 2*K*C*C.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "../checks/gram_norm.h"
#include "affine.h"
#include "alloc.h"
#include "rows.h"
#include "weight_rows.h"

namespace resnet_fused::cpu {
namespace {

// Columns [j, j + kPanel) of gram/count - m m', in which digits cancel.
template <class A>
RESNET_FUSED_CLONES void pack_covariance(A* packed, const A* gram, const double* m, double count, int64_t j,
                                         int64_t C) {
  pack_panels(packed, C, C, std::min(kPanel<A>, C - j), [&](int64_t r, int64_t i) {
    return static_cast<A>(std::fma(-m[r], m[j + i], gram[r * C + j + i] / count));
  });
}

// shifted: m + centre
template <class A>
RESNET_FUSED_CLONES void sum_rows(A* mean, A* m2, const A* w, const A* y, const A* shifted, double count, int64_t rows,
                                  int64_t C) {
  constexpr int64_t P = kPanel<A>;
  for (int64_t r = 0; r < rows; ++r) {
    const double var = dot_rows(w + r * P, kBlockRows, y + r * P, kBlockRows, C);
    mean[r] = static_cast<A>(dot_rows(w + r * P, kBlockRows, shifted, 1, C));
    m2[r] = static_cast<A>((var < 0 ? 0 : var) * count);  // NaN passes
  }
}

template <class T>
void run(const Tensor& mean, const Tensor& m2, const Tensor& weight, const Tensor& gram, const Tensor& total,
         const Tensor& centre, double count) {
  using A = acc_t<T>;
  const int64_t K = weight.size(0), C = weight.size(1), columns = padded<A>(C);
  std::vector<double> m(C);
  std::vector<A> shifted(columns);
  for (int64_t c = 0; c < C; ++c) {
    m[c] = data<A>(total)[c] / count;
    shifted[c] = static_cast<A>(m[c] + data<A>(centre)[c]);
  }
  const auto covariance = aligned_array<A>(columns * C);
  parallel_panels<A>(
      C, 16, [&](int64_t j) { pack_covariance(covariance.get() + j * C, data<A>(gram), m.data(), count, j, C); });
  parallel_row_blocks<A>(K, C, [&](int64_t row, int64_t rows, BlockBuffers<A>& buffers) {
    A *w = buffers.first.get(), *y = buffers.second.get();
    pack_rows(w, kBlockRows, data<T>(weight) + row * C, C, rows, C);
    multiply_rows(y, w, kBlockRows, covariance.get(), rows, C);
    sum_rows(data<A>(mean) + row, data<A>(m2) + row, w, y, shifted.data(), count, rows, C);
  });
}

Statistics gram_norm(const Tensor& weight, const Tensor& gram, const Tensor& total, const Tensor& centre,
                     const Tensor& a, const OptionalTensor& gamma, const OptionalTensor& beta,
                     std::optional<double> eps) {
  check_gram_norm(weight, gram, total, centre, a, gamma, beta, eps);
  const ScalarType dtype = stat_dtype(weight.scalar_type());
  Tensor mean = empty_vector(weight.size(0), dtype), m2 = empty_vector(weight.size(0), dtype);
  const int64_t count = a.size(0) * a.size(2) * a.size(3);
  if (count == 0) {
    return statistics(torch::stable::zero_(mean), torch::stable::zero_(m2), gamma, beta, a, eps);
  }
  for_element_type(weight.scalar_type(), [&](auto* tag) {
    run<std::remove_pointer_t<decltype(tag)>>(mean, m2, weight, gram, total, centre, static_cast<double>(count));
  });
  return statistics(mean, m2, gamma, beta, a, eps);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { m.impl("gram_norm", TORCH_BOX(&gram_norm)); }

}  // namespace resnet_fused::cpu
