// Element types of the CPU loops. Loads widen to the accumulation type, stores round to nearest even; both are plain
// integer and float arithmetic, so that the compiler vectorises them at every level of RESNET_FUSED_CLONES (GCC 12
// leaves `_Float16` scalar).
#pragma once

#include <cstdint>

#include "../cpu_levels.h"

#if defined(__GNUC__)
#define RESNET_FUSED_INLINE inline __attribute__((always_inline))
#else
#define RESNET_FUSED_INLINE inline
#endif

namespace resnet_fused::cpu {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
// Type of per-channel vectors and of all arithmetic for elements of type T.
template <class T>
using acc_t = typename Accumulate<T>::type;

RESNET_FUSED_INLINE float as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
RESNET_FUSED_INLINE uint32_t as_bits(float value) { return __builtin_bit_cast(uint32_t, value); }

RESNET_FUSED_INLINE float load(const float* p) { return *p; }
RESNET_FUSED_INLINE double load(const double* p) { return *p; }
RESNET_FUSED_INLINE float load(const BFloat16* p) { return as_float(uint32_t(p->bits) << 16); }
RESNET_FUSED_INLINE float load(const Half* p) {
  // Rebias the exponent by a multiplication, which maps inf and NaN onto themselves; subnormal halves take another way,
  // since they would be float subnormals before the multiplication (slow, and zero when those are flushed).
  const uint32_t word = uint32_t(p->bits) << 16;
  const uint32_t twice = word + word;
  const uint32_t normal = as_bits(as_float((twice >> 4) + (0xE0u << 23)) * 0x1.0p-112f);
  const uint32_t subnormal = as_bits(as_float((twice >> 17) | (126u << 23)) - 0.5f);
  return as_float((word & 0x80000000u) | (twice < (1u << 27) ? subnormal : normal));
}

RESNET_FUSED_INLINE void store(float* p, float value) { *p = value; }
RESNET_FUSED_INLINE void store(double* p, double value) { *p = value; }
RESNET_FUSED_INLINE void store(BFloat16* p, float value) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  p->bits = static_cast<uint16_t>(value != value ? 0x7FC0u : rounded);
}
RESNET_FUSED_INLINE void store(Half* p, float value) {
  // Let a float addition round at the half's last bit: add 2^k whose ulp is that bit, then take the low bits.
  const uint32_t bits = as_bits(value);
  const uint32_t twice = bits + bits;
  const uint32_t exponent = twice & 0xFF000000u;
  const uint32_t bias = exponent < 0x71000000u ? 0x71000000u : exponent;
  const float magnitude = as_float(bits & 0x7FFFFFFFu);
  const float scaled = (magnitude * 0x1.0p+112f) * 0x1.0p-110f;  // overflows to inf where the half does
  const uint32_t sum = as_bits(as_float((bias >> 1) + 0x07800000u) + scaled);
  const uint32_t finite = ((sum >> 13) & 0x7C00u) + (sum & 0x0FFFu);
  p->bits = static_cast<uint16_t>(((bits >> 16) & 0x8000u) | (twice > 0xFF000000u ? 0x7E00u : finite));
}

// sum += value * column. Where registers hold all sums, two columns and one value more, GCC 12 writes some products
// over what they multiply and then keeps a sum in memory: told to write each over its sum, it does not. On a Zen 3
// that is 92 and 99% of the peak.
template <class V>
RESNET_FUSED_INLINE void multiply_add(V& sum, float value, const V& column) {
#if defined(RESNET_FUSED_LEVEL_256) && __GNUC__ >= 12
  if constexpr (sizeof(V) == 32) {
    const V values = value - V{};
    V written = sum;
    asm("vfmadd231ps %2, %1, %0" : "+x"(written) : "x"(column), "x"(values));
    sum = written;
    return;
  }
#endif
  sum += value * column;
}

}  // namespace resnet_fused::cpu
