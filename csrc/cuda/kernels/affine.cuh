// Batch norm's per-channel arithmetic: of bn_affine and bn_coefficients, and of the kernels that take statistics or
// sums themselves. Its meaning is in resnet_fused/ops/bn_affine.py and bn_coefficients.py.
#pragma once

#include "tile.cuh"

namespace resnet_fused::cuda {

__device__ inline float parameter(const NormParameter& p, int64_t channel, float absent) {
  if (!p.data) return absent;
  const int64_t at = channel * p.stride;
  switch (p.type) {
    case ParameterType::kDouble: return static_cast<float>(static_cast<const double*>(p.data)[at]);
    case ParameterType::kHalf: return to_float(static_cast<const __half*>(p.data)[at]);
    case ParameterType::kBFloat16: return to_float(static_cast<const __nv_bfloat16*>(p.data)[at]);
    default: return static_cast<const float*>(p.data)[at];
  }
}

__device__ inline float finite_or_zero(float value) { return value - value == 0.f ? value : 0.f; }

// E relu(N(beta, gamma^2)), 0 where it is not finite.
__device__ inline float relu_mean(float gamma, float beta) {
  constexpr float kDensity = 0.3989422804014327f, kRootHalf = 0.7071067811865476f;  // 1/sqrt(2 pi), sqrt(1/2)
  const float sigma = fabsf(gamma), t = beta / (sigma < 1e-12f ? 1e-12f : sigma);
  return finite_or_zero(beta * 0.5f * (1.f + erff(t * kRootHalf)) + sigma * (kDensity * expf(-0.5f * t * t)));
}

// Of a channel with this mean and second moment over `rows` rows.
__device__ inline void store_affine(const AffineParams& p, int64_t channel, int64_t rows, float mean, float m2) {
  const float gamma = parameter(p.gamma, channel, 1.f), beta = parameter(p.beta, channel, 0.f);
  const float var = rows > 0 ? m2 / static_cast<float>(rows) : 0.f;
  const float rstd = 1.f / sqrtf(var + p.eps), scale = gamma * rstd;
  p.var[channel] = var;
  p.rstd[channel] = rstd;
  p.scale[channel] = scale;
  p.shift[channel] = fmaf(-mean, scale, beta);
  p.centre[channel] = relu_mean(gamma, beta);
}

// What an op that takes statistics returns: the mean, and the second moment or what follows from both.
__device__ inline void store_statistics(const StatisticsParams& p, int64_t channel, float mean, float m2) {
  p.mean[channel] = mean;
  if (p.m2) {
    p.m2[channel] = m2;
  } else {
    store_affine(p.affine, channel, p.rows, mean, m2);
  }
}

// Backward, of a channel with these sums of its gradient.
__device__ inline void store_coefficients(const BnCoefficientsParams& p, int64_t channel, float sum_g, float sum_gz) {
  const float rstd = p.rstd[channel], grad_gamma = rstd * sum_gz;
  float b = 0.f, d = 0.f;
  if (p.rows > 0) {
    const float unit = p.scale[channel] / static_cast<float>(p.rows);
    b = -unit * (rstd * grad_gamma);
    d = fmaf(-b, p.mean[channel], -unit * sum_g);  // of b as rounded
  }
  p.b[channel] = b;
  p.d[channel] = d;
  p.grad_gamma[channel] = grad_gamma;
}

}  // namespace resnet_fused::cuda
