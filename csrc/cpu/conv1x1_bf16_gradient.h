// The lazy gradient of a 1x1 convolution's output in bfloat16, applied on load in float32 and rounded: dz of lazy.py.
#pragma once

#include "conv1x1_bf16_values.h"

#ifdef RESNET_FUSED_BF16

namespace resnet_fused::cpu::bf16 {

enum class Keep {
  kAll,
  kBits,
  kSign
};  // which gradients pass: all, by the mask's bits, by the sign of scale*z + shift

struct Gradient {
  const uint16_t *g, *z;                   // [rows, K]; z null where no term needs it
  const float *a, *b, *d, *scale, *shift;  // [K]; b and d null, scale and shift null: no such term
  const float* factor;                     // [N] or null
  const uint8_t* mask;                     // [rows, mask_bytes(K)] or null
  int64_t K, rows_per_sample;
};

// Which lanes pass, of those of a row from channel k on, by the row's bits.
template <bool full>
RESNET_FUSED_BF16_INLINE __mmask16 kept_by_bits(const uint8_t* mask, int64_t k, int64_t K) {
  uint16_t bits;
  if (!full) return k >= K ? 0 : static_cast<__mmask16>(mask[k / 8] | (k + 8 < K ? mask[k / 8 + 1] << 8 : 0));
  std::memcpy(&bits, mask + k / 8, 2);
  return bits;
}

// A vector of a row of dz; `full`: all its lanes are there.
template <Keep keep, bool with_b, bool full>
RESNET_FUSED_BF16_INLINE __m512 gradient_lanes(const Gradient& p, int64_t row, int64_t k, __m512 factor) {
  const __mmask16 lanes = full ? 0xFFFF : lanes_of(p.K - k);
  __m512 value = load_wide<full>(lanes, p.g + row * p.K + k), z = _mm512_setzero_ps();
  if (with_b || keep == Keep::kSign) z = load_wide<full>(lanes, p.z + row * p.K + k);
  if (keep == Keep::kBits) {
    value = _mm512_maskz_mov_ps(kept_by_bits<full>(p.mask + row * mask_bytes(p.K), k, p.K), value);
  }
  if (keep == Keep::kSign) {
    const __m512 at = _mm512_fmadd_ps(z, load_floats<full>(lanes, p.scale + k), load_floats<full>(lanes, p.shift + k));
    value = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(at, _mm512_setzero_ps(), _CMP_NLE_UQ), value);
  }
  value = _mm512_mul_ps(value, _mm512_mul_ps(factor, load_floats<full>(lanes, p.a + k)));
  if (with_b) {
    const __m512 more = _mm512_fmadd_ps(z, load_floats<full>(lanes, p.b + k), load_floats<full>(lanes, p.d + k));
    value = _mm512_add_ps(value, more);
  }
  return full ? value : _mm512_maskz_mov_ps(lanes, value);
}

template <Keep keep, bool with_b>
RESNET_FUSED_BF16_GROUP void write_gradient_of(const Gradient& p, int64_t row, int64_t rows, uint16_t* out) {
  const int64_t pitch = pitch_of(p.K), whole = p.K / kPanel * kPanel;
  for (int64_t r = row; r < row + rows; ++r, out += pitch) {
    const __m512 factor = _mm512_set1_ps(p.factor ? p.factor[r / p.rows_per_sample] : 1.0f);
    for (int64_t k = 0; k < whole; k += kPanel) {
      const __m512 low = gradient_lanes<keep, with_b, true>(p, r, k, factor);
      _mm512_storeu_si512(out + k, round_pair(low, gradient_lanes<keep, with_b, true>(p, r, k + kLanes, factor)));
    }
    if (whole == p.K) continue;
    const __m512 low = gradient_lanes<keep, with_b, false>(p, r, whole, factor);
    _mm512_storeu_si512(out + whole,
                        round_pair(low, gradient_lanes<keep, with_b, false>(p, r, whole + kLanes, factor)));
  }
}

// Rows [row, row + rows) of dz as rows of the scratch, zeros up to whole panels.
RESNET_FUSED_BF16_INLINE void write_gradient(const Gradient& p, int64_t row, int64_t rows, uint16_t* out) {
  if (p.mask) {
    return p.b ? write_gradient_of<Keep::kBits, true>(p, row, rows, out)
               : write_gradient_of<Keep::kBits, false>(p, row, rows, out);
  }
  if (p.scale) {
    return p.b ? write_gradient_of<Keep::kSign, true>(p, row, rows, out)
               : write_gradient_of<Keep::kSign, false>(p, row, rows, out);
  }
  p.b ? write_gradient_of<Keep::kAll, true>(p, row, rows, out)
      : write_gradient_of<Keep::kAll, false>(p, row, rows, out);
}

}  // namespace resnet_fused::cpu::bf16
#endif
