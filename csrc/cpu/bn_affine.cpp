// Batch norm's per-channel arithmetic, forward: a loop over a few hundred channels instead of twenty operations on
// them.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "../checks/bn_affine.h"
#include "alloc.h"
#include "rows.h"

namespace resnet_fused::cpu {
namespace {

// E relu(N(beta, gamma^2)), 0 where it is not finite.
template <class A>
A relu_mean(A gamma, A beta) {
  const A sigma = std::abs(gamma), t = beta / std::max(sigma, A(1e-12));
  const A density = std::exp(A(-0.5) * t * t) / std::sqrt(A(2 * 3.14159265358979323846));
  const A centre = beta * A(0.5) * (1 + std::erf(t / std::sqrt(A(2)))) + sigma * density;
  return std::isfinite(centre) ? centre : A(0);
}

struct Results {
  Tensor var, rstd, scale, shift, centre;  // [C]
};

template <class A>
void run(const Results& out, const Tensor& mean, const Tensor& m2, const OptionalTensor& gamma,
         const OptionalTensor& beta, double count, double eps) {
  const A *means = data<A>(mean), *m2s = data<A>(m2), *gammas = data<A>(gamma), *betas = data<A>(beta);
  for (int64_t c = 0; c < mean.numel(); ++c) {
    const A var = count > 0 ? m2s[c] / A(count) : A(0), rstd = 1 / std::sqrt(var + A(eps));
    const A g = gammas ? gammas[c] : A(1), b = betas ? betas[c] : A(0);
    const A scale = g * rstd;
    data<A>(out.var)[c] = var;
    data<A>(out.rstd)[c] = rstd;
    data<A>(out.scale)[c] = scale;
    data<A>(out.shift)[c] = b - means[c] * scale;
    data<A>(out.centre)[c] = relu_mean<A>(g, b);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bn_affine(const Tensor& mean, const Tensor& m2,
                                                             const OptionalTensor& gamma, const OptionalTensor& beta,
                                                             const Tensor& z, double eps) {
  check_bn_affine(mean, m2, gamma, beta);
  const auto vector = [&] { return empty_strided<1>({mean.numel()}, {1}, mean.scalar_type()); };
  const Results out{vector(), vector(), vector(), vector(), vector()};
  const double count = static_cast<double>(z.size(0) * z.size(2) * z.size(3));
  if (mean.scalar_type() == ScalarType::Double) {
    run<double>(out, mean, m2, gamma, beta, count, eps);
  } else {
    run<float>(out, mean, m2, gamma, beta, count, eps);
  }
  return {out.var, out.rstd, out.scale, out.shift, out.centre};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { m.impl("bn_affine", TORCH_BOX(&bn_affine)); }

}  // namespace resnet_fused::cpu
