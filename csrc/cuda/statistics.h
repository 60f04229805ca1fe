// What the CUDA ops that take batch statistics share: batch norm's parameters, and the results in either of their
// forms.
#pragma once

#include <tuple>

#include "common.h"

namespace resnet_fused::cuda {

inline NormParameter parameter_of(const OptionalTensor& t) {
  if (!t) return {nullptr, 0, ParameterType::kFloat};
  ParameterType type = ParameterType::kFloat;
  switch (t->scalar_type()) {
    case ScalarType::Double: type = ParameterType::kDouble; break;
    case ScalarType::Half: type = ParameterType::kHalf; break;
    case ScalarType::BFloat16: type = ParameterType::kBFloat16; break;
    default: break;
  }
  return {t->numel() ? t->const_data_ptr() : nullptr, t->stride(0), type};
}

// var, rstd, scale, shift and centre.
struct AffineOutputs {
  Tensor var, rstd, scale, shift, centre;  // [C] each

  AffineOutputs(const Tensor& like, int64_t channels)
      : var(vector(like, channels)),
        rstd(vector(like, channels)),
        scale(vector(like, channels)),
        shift(vector(like, channels)),
        centre(vector(like, channels)) {}

  static Tensor vector(const Tensor& like, int64_t size) { return empty_like(like, {size}, ScalarType::Float); }

  AffineParams params(const OptionalTensor& gamma, const OptionalTensor& beta, double eps) const {
    return {parameter_of(gamma), parameter_of(beta),   static_cast<float>(eps), output<float>(var),
            output<float>(rstd), output<float>(scale), output<float>(shift),    output<float>(centre)};
  }
};

using Statistics = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The statistics of [rows, channels] beside the data `like`: with eps batch norm's multiply-add in the place of m2.
struct StatisticsOutputs {
  Tensor mean, m2;
  AffineOutputs affine;
  StatisticsParams params;

  StatisticsOutputs(const Tensor& like, int64_t rows, int64_t channels, const OptionalTensor& gamma,
                    const OptionalTensor& beta, std::optional<double> eps)
      : mean(AffineOutputs::vector(like, channels)),
        m2(AffineOutputs::vector(like, eps ? 0 : channels)),
        affine(like, eps ? channels : 0),
        params{rows, channels, output<float>(mean), output<float>(m2), affine.params(gamma, beta, eps.value_or(0.))} {}

  Statistics results() const { return {mean, m2, affine.var, affine.rstd, affine.scale, affine.shift, affine.centre}; }
};

}  // namespace resnet_fused::cuda
