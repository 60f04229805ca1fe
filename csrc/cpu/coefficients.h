// Batch norm's per-channel arithmetic, backward: of bn_coefficients, and of the ops that make the sums themselves.
#pragma once

#include <cmath>
#include <tuple>

#include "alloc.h"
#include "rows.h"

namespace resnet_fused::cpu {

struct CoefficientArguments {
  const Tensor &sum_g, &sum_gz, &mean, &rstd, &scale;  // [C]
};

template <class A>
void coefficients(const Tensor& b, const Tensor& d, const Tensor& grad_gamma, const CoefficientArguments& t,
                  double count) {
  const A *sum_g = data<A>(t.sum_g), *sum_gz = data<A>(t.sum_gz), *mean = data<A>(t.mean), *rstd = data<A>(t.rstd),
          *scale = data<A>(t.scale);
  for (int64_t c = 0; c < t.sum_g.numel(); ++c) {
    const A gradient = rstd[c] * sum_gz[c], unit = count > 0 ? scale[c] / A(count) : A(0);
    const A slope = count > 0 ? -unit * (rstd[c] * gradient) : A(0);
    data<A>(grad_gamma)[c] = gradient;
    data<A>(b)[c] = slope;
    data<A>(d)[c] = count > 0 ? std::fma(-slope, mean[c], -unit * sum_g[c]) : A(0);
  }
}

// b, d and the gradient of gamma. `z`: any tensor of as many pixels as the sums are of.
inline std::tuple<Tensor, Tensor, Tensor> coefficients(const Tensor& sum_g, const Tensor& sum_gz, const Tensor& mean,
                                                       const Tensor& rstd, const Tensor& scale, const Tensor& z) {
  const auto vector = [&] { return empty_strided<1>({sum_g.numel()}, {1}, sum_g.scalar_type()); };
  Tensor b = vector(), d = vector(), grad_gamma = vector();
  const double count = static_cast<double>(z.size(0) * z.size(2) * z.size(3));
  const CoefficientArguments arguments{sum_g, sum_gz, mean, rstd, scale};
  if (sum_g.scalar_type() == ScalarType::Double) {
    coefficients<double>(b, d, grad_gamma, arguments, count);
  } else {
    coefficients<float>(b, d, grad_gamma, arguments, count);
  }
  return {b, d, grad_gamma};
}

}  // namespace resnet_fused::cpu
