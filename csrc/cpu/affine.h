// Batch norm's per-channel arithmetic, forward: of bn_affine, and of the ops that take statistics themselves.
#pragma once

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "../checks/common.h"
#include "alloc.h"
#include "rows.h"

namespace resnet_fused::cpu {

// E relu(N(beta, gamma^2)), 0 where it is not finite.
template <class A>
A relu_mean(A gamma, A beta) {
  const A sigma = std::abs(gamma), t = beta / std::max(sigma, A(1e-12));
  const A density = std::exp(A(-0.5) * t * t) / std::sqrt(A(2 * 3.14159265358979323846));
  const A centre = beta * A(0.5) * (1 + std::erf(t / std::sqrt(A(2)))) + sigma * density;
  return std::isfinite(centre) ? centre : A(0);
}

struct Affine {
  Tensor var, rstd, scale, shift, centre;  // [C]
};

// The elements of an absent vector are `absent`. A parameter is the user's: of any floating dtype, at any stride.
template <class A>
std::vector<A> parameter(const OptionalTensor& t, int64_t size, A absent) {
  std::vector<A> values(size, absent);
  if (!t) return values;
  const int64_t stride = t->stride(0);
  for_element_type(t->scalar_type(), [&](auto* tag) {
    const auto* from = data<std::remove_pointer_t<decltype(tag)>>(*t);
    for (int64_t c = 0; c < size; ++c) values[c] = static_cast<A>(load(from + c * stride));
  });
  return values;
}

template <class A>
void affine(const Affine& out, const Tensor& mean, const Tensor& m2, const OptionalTensor& gamma,
            const OptionalTensor& beta, double count, double eps) {
  const A *means = data<A>(mean), *m2s = data<A>(m2);
  const std::vector<A> gammas = parameter(gamma, mean.numel(), A(1)), betas = parameter(beta, mean.numel(), A(0));
  for (int64_t c = 0; c < mean.numel(); ++c) {
    const A var = count > 0 ? m2s[c] / A(count) : A(0), rstd = 1 / std::sqrt(var + A(eps));
    const A scale = gammas[c] * rstd;
    data<A>(out.var)[c] = var;
    data<A>(out.rstd)[c] = rstd;
    data<A>(out.scale)[c] = scale;
    data<A>(out.shift)[c] = betas[c] - means[c] * scale;
    data<A>(out.centre)[c] = relu_mean<A>(gammas[c], betas[c]);
  }
}

// `like`: any tensor of as many pixels as the statistics are of.
inline Affine affine(const Tensor& mean, const Tensor& m2, const OptionalTensor& gamma, const OptionalTensor& beta,
                     const Tensor& like, double eps) {
  const auto vector = [&] { return empty_vector(mean.numel(), mean.scalar_type()); };
  const Affine out{vector(), vector(), vector(), vector(), vector()};
  const double count = static_cast<double>(like.size(0) * like.size(2) * like.size(3));
  mean.scalar_type() == ScalarType::Double ? affine<double>(out, mean, m2, gamma, beta, count, eps)
                                           : affine<float>(out, mean, m2, gamma, beta, count, eps);
  return out;
}

// What an op that takes statistics returns: the mean, and the second moment or, with eps, what follows from both.
using Statistics = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

inline Statistics statistics(const Tensor& mean, const Tensor& m2, const OptionalTensor& gamma,
                             const OptionalTensor& beta, const Tensor& like, std::optional<double> eps) {
  const auto none = [&] { return empty_vector(0, mean.scalar_type()); };
  if (!eps) return {mean, m2, none(), none(), none(), none(), none()};
  const Affine found = affine(mean, m2, gamma, beta, like, *eps);
  return {mean, none(), found.var, found.rstd, found.scale, found.shift, found.centre};
}

}  // namespace resnet_fused::cpu
