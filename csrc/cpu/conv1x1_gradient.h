// The lazy gradient of a 1x1 convolution's output, applied on load into rows that products read: dz of lazy.py.
#pragma once

#include <type_traits>

#include "bits.h"
#include "conv1x1_values.h"

namespace resnet_fused::cpu {

enum class Keep {
  kAll,
  kBits,
  kSign
};  // which gradients pass: all, by the mask's bits, by the sign of scale*z + shift

struct Gradient {
  const float *g, *z;                      // [rows, K]; z null where no term needs it
  const float *a, *b, *d, *scale, *shift;  // [K]; b and d null, scale and shift null: no such term
  const float* factor;                     // [N] or null
  const uint8_t* mask;                     // [rows, mask_bytes(K)] or null
  int64_t K, rows_per_sample;

  bool reads_z() const { return b || keep() == Keep::kSign; }
  Keep keep() const { return mask ? Keep::kBits : scale ? Keep::kSign : Keep::kAll; }
};

// Zero where the bit of the lane is not set.
template <class V>
RESNET_FUSED_INLINE void mask_lanes(V& value, const uint8_t* mask, int64_t k) {
  if constexpr (std::is_same_v<V, float>) {
    if (!(mask[k / 8] >> (k % 8) & 1)) value = 0;
  } else {
    using I = decltype(value < value);
    constexpr int64_t lanes = sizeof(V) / sizeof(float);
    I bits;
    for (int64_t i = 0; i < lanes; ++i) bits[i] = 1 << i;
    int32_t word = mask[k / 8] >> (k % 8);
    if constexpr (lanes > 8) word |= mask[k / 8 + 1] << 8;
    const V zero = {};
    value = (bits & word) != 0 ? value : zero;
  }
}

template <class V, Keep keep, bool with_z>
RESNET_FUSED_INLINE void gradient_lanes(const Gradient& p, int64_t row, int64_t k, float factor, float* out) {
  V value, z, scale, shift;
  load_lanes(value, p.g + row * p.K + k);
  if constexpr (with_z || keep == Keep::kSign) load_lanes(z, p.z + row * p.K + k);
  if constexpr (keep == Keep::kBits) mask_lanes(value, p.mask + row * mask_bytes(p.K), k);
  if constexpr (keep == Keep::kSign) {
    load_lanes(scale, p.scale + k), load_lanes(shift, p.shift + k);
    const V zero = {};
    value = z * scale + shift <= zero ? zero : value;
  }
  load_lanes(scale, p.a + k);
  value *= scale * factor;
  if constexpr (with_z) {
    load_lanes(scale, p.b + k), load_lanes(shift, p.d + k);
    value += scale * z + shift;
  }
  store_lanes(out + k, value);
}

template <class L, Keep keep, bool with_z>
RESNET_FUSED_INLINE void write_gradient_of(const Gradient& p, int64_t row, int64_t rows, float* out, int64_t pitch) {
  const int64_t vectors = p.K / L::lanes * L::lanes;
  for (int64_t r = row; r < row + rows; ++r, out += pitch) {
    const float factor = p.factor ? p.factor[r / p.rows_per_sample] : 1.0f;
    for (int64_t k = 0; k < vectors; k += L::lanes) {
      __builtin_prefetch(p.g + r * p.K + k + kFloatsAhead);
      if (with_z) __builtin_prefetch(p.z + r * p.K + k + kFloatsAhead);
      gradient_lanes<typename L::Vector, keep, with_z>(p, r, k, factor, out);
    }
    for (int64_t k = vectors; k < p.K; ++k) gradient_lanes<float, keep, with_z>(p, r, k, factor, out);
  }
}

// Rows [row, row + rows) of dz.
template <class L>
RESNET_FUSED_INLINE void write_gradient(const Gradient& p, int64_t row, int64_t rows, float* out, int64_t pitch) {
  switch (p.keep()) {
    case Keep::kAll:
      return p.b ? write_gradient_of<L, Keep::kAll, true>(p, row, rows, out, pitch)
                 : write_gradient_of<L, Keep::kAll, false>(p, row, rows, out, pitch);
    case Keep::kBits:
      return p.b ? write_gradient_of<L, Keep::kBits, true>(p, row, rows, out, pitch)
                 : write_gradient_of<L, Keep::kBits, false>(p, row, rows, out, pitch);
    case Keep::kSign:
      return p.b ? write_gradient_of<L, Keep::kSign, true>(p, row, rows, out, pitch)
                 : write_gradient_of<L, Keep::kSign, false>(p, row, rows, out, pitch);
  }
}

}  // namespace resnet_fused::cpu
