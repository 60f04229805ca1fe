// The activations of norm_act with their derivatives, in plain arithmetic that the compiler vectorises at every level
// of RESNET_FUSED_CLONES. Codes and meaning: resnet_fused/ops/activation.py. In float32 an exponential is off by about
// one unit in the last place; NaN passes everywhere, overflow gives infinity and underflow goes through subnormals, as
// in the C library's functions.
#pragma once

#include <cmath>
#include <cstdint>

#include "simd.h"

namespace resnet_fused::cpu {

enum class Act : int64_t { kSilu, kGelu, kGeluTanh, kLeakyRelu, kHardswish, kRelu6 };

// e^x. 2^n e^r with |r| <= ln(2)/2; 2^n in two factors, since n reaches from -150 to 128.
RESNET_FUSED_INLINE float exponential(float x) {
  x = x > 89.0f ? 89.0f : x;
  x = x < -104.0f ? -104.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's last bits are the integer nearest to it
  const float n = shifted - 12582912.0f;
  // ln(2) in two parts, the first with so few bits that its product with n is exact
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float tail = 1.989108046e-4f;  // of (e^r - 1 - r) / r^2: a Chebyshev fit, relative error of e^r below 2e-10
  tail = tail * r + 1.393373072e-3f;
  tail = tail * r + 8.333310845e-3f;
  tail = tail * r + 4.166646420e-2f;
  tail = tail * r + 1.666666668e-1f;
  tail = tail * r + 5.000000014e-1f;
  const float value = (tail * (r * r) + r) + 1.0f;
  const int32_t whole = __builtin_bit_cast(int32_t, shifted) - 0x4B400000, half = whole >> 1;
  const float low = __builtin_bit_cast(float, (half + 127) << 23);
  const float high = __builtin_bit_cast(float, (whole - half + 127) << 23);
  return value * low * high;
}
RESNET_FUSED_INLINE double exponential(double x) { return std::exp(x); }

template <class A>
RESNET_FUSED_INLINE A sigmoid(A y) {
  return A(1) / (A(1) + exponential(-y));
}

// Phi(y), and by `density` Phi'(y).
RESNET_FUSED_INLINE float normal(float y, float& density) {
  const float t = y < 0 ? -y : y;
  const float e = exponential(-0.5f * (t * t));
  // Phi(-t) e^(t^2/2) as a polynomial in s without a constant term: a Chebyshev fit for t in [0, 14], error below 2e-9
  const float s = 1.0f / (1.0f + 0.3f * t);
  float tail = -2.091435973e-2f;
  tail = tail * s + 1.140402721e-1f;
  tail = tail * s - 2.320384829e-1f;
  tail = tail * s + 1.969406770e-1f;
  tail = tail * s - 8.374254902e-2f;
  tail = tail * s + 9.848074018e-2f;
  tail = tail * s + 7.758906438e-2f;
  tail = tail * s + 1.104051798e-1f;
  tail = tail * s + 1.195517632e-1f;
  tail = tail * s + 1.196876931e-1f;
  const float outer = tail * s * e;
  density = 0.398942280f * e;
  return y < 0 ? outer : 1.0f - outer;
}
RESNET_FUSED_INLINE double normal(double y, double& density) {
  density = 0.39894228040143267794 * std::exp(-0.5 * y * y);
  return 0.5 * std::erfc(-0.70710678118654752440 * y);
}

// sigmoid(2u) with u of the approximate GELU, and du/dy by `inner`.
template <class A>
RESNET_FUSED_INLINE A gelu_gate(A y, A& inner) {
  constexpr A k = A(0.79788456080286535588), c = A(0.044715);
  inner = k * (A(1) + (A(3) * c) * (y * y));
  return sigmoid(A(2) * (k * (y + c * (y * y * y))));
}

template <Act act, class A>
RESNET_FUSED_INLINE A activation(A y, A slope) {
  if constexpr (act == Act::kSilu) return y / (A(1) + exponential(-y));
  if constexpr (act == Act::kGelu) {
    A density;
    return y * normal(y, density);
  }
  if constexpr (act == Act::kGeluTanh) {
    A inner;
    return y * gelu_gate(y, inner);
  }
  if constexpr (act == Act::kLeakyRelu) return y > 0 ? y : y * slope;
  if constexpr (act == Act::kHardswish) {
    A t = y + A(3);
    t = t < 0 ? A(0) : t;
    t = t > A(6) ? A(6) : t;
    return y * t / A(6);
  }
  const A t = y < 0 ? A(0) : y;
  return t > A(6) ? A(6) : t;
}

// g times the derivative at y. Where stock selects, a select: a NaN gradient vanishes where it does there.
template <Act act, class A>
RESNET_FUSED_INLINE A activation_gradient(A g, A y, A slope) {
  if constexpr (act == Act::kSilu) {
    const A s = sigmoid(y);
    return g * (s * (A(1) + y * (A(1) - s)));
  }
  if constexpr (act == Act::kGelu) {
    A density;
    const A cumulative = normal(y, density);
    return g * (cumulative + y * density);
  }
  if constexpr (act == Act::kGeluTanh) {
    A inner;
    const A s = gelu_gate(y, inner);
    return g * (s + y * (A(2) * s * (A(1) - s)) * inner);
  }
  if constexpr (act == Act::kLeakyRelu) return y > 0 ? g : g * slope;
  if constexpr (act == Act::kHardswish) {
    const A inside = g * (y / A(3) + A(0.5));
    const A above = y >= A(3) ? g : inside;
    return y <= A(-3) ? A(0) : above;
  }
  return (y > 0) & (y < A(6)) ? g : A(0);
}

// f(std::integral_constant<Act, act>) for a code that check_act() has accepted.
template <class F>
void for_act(int64_t act, const F& f) {
  switch (static_cast<Act>(act)) {
    case Act::kSilu: return f(std::integral_constant<Act, Act::kSilu>());
    case Act::kGelu: return f(std::integral_constant<Act, Act::kGelu>());
    case Act::kGeluTanh: return f(std::integral_constant<Act, Act::kGeluTanh>());
    case Act::kLeakyRelu: return f(std::integral_constant<Act, Act::kLeakyRelu>());
    case Act::kHardswish: return f(std::integral_constant<Act, Act::kHardswish>());
    default: return f(std::integral_constant<Act, Act::kRelu6>());
  }
}

}  // namespace resnet_fused::cpu
