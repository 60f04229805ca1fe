// The lazy gradient of a 1x1 convolution's output in bfloat16, applied on load in float32 and rounded: dz of lazy.py.
#pragma once

#include "conv1x1_bf16_values.h"

#ifdef RESNET_FUSED_BF16

namespace resnet_fused::cpu::bf16 {

struct Gradient {
  const uint16_t *g, *z;                   // [rows, K]; z null where no term needs it
  const float *a, *b, *d, *scale, *shift;  // [K]; a null: 1; b and d null, scale and shift null: no such term
  const float* factor;                     // [N] or null
  const uint8_t* mask;                     // [rows, mask_bytes(K)] or null
  int64_t K, rows_per_sample;
};

// Which lanes pass, of those of a row from channel k on, by the row's bits.
RESNET_FUSED_BF16_INLINE __mmask16 kept_by_bits(const uint8_t* mask, int64_t k, int64_t K) {
  return static_cast<__mmask16>(mask[k / 8] | (k + 8 < K ? mask[k / 8 + 1] << 8 : 0));
}

// A vector of a row of dz.
template <bool with_z>
RESNET_FUSED_BF16_INLINE __m256i gradient_lanes(const Gradient& p, int64_t row, int64_t k, __m512 factor) {
  const __mmask16 lanes = lanes_of(p.K - k);
  __m512 value = load_wide(lanes, p.g + row * p.K + k), z = _mm512_setzero_ps();
  if (with_z) z = load_wide(lanes, p.z + row * p.K + k);
  if (p.mask && lanes) value = _mm512_maskz_mov_ps(kept_by_bits(p.mask + row * mask_bytes(p.K), k, p.K), value);
  if (with_z && p.scale) {
    const __m512 at =
        _mm512_fmadd_ps(z, _mm512_maskz_loadu_ps(lanes, p.scale + k), _mm512_maskz_loadu_ps(lanes, p.shift + k));
    value = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(at, _mm512_setzero_ps(), _CMP_NLE_UQ), value);
  }
  if (p.a) factor = _mm512_mul_ps(factor, _mm512_maskz_loadu_ps(lanes, p.a + k));
  value = _mm512_mul_ps(value, factor);
  if (with_z && p.b) {
    const __m512 more =
        _mm512_fmadd_ps(z, _mm512_maskz_loadu_ps(lanes, p.b + k), _mm512_maskz_loadu_ps(lanes, p.d + k));
    value = _mm512_add_ps(value, more);
  }
  return (__m256i)_mm512_maskz_cvtneps_pbh(lanes, value);
}

// Rows [row, row + rows) of dz as rows of the scratch, zeros up to whole panels.
template <bool with_z>
RESNET_FUSED_BF16_INLINE void write_gradient(const Gradient& p, int64_t row, int64_t rows, uint16_t* out) {
  const int64_t pitch = pitch_of(p.K), width = padded(p.K);
  for (int64_t r = row; r < row + rows; ++r, out += pitch) {
    const __m512 factor = _mm512_set1_ps(p.factor ? p.factor[r / p.rows_per_sample] : 1.0f);
    for (int64_t k = 0; k < width; k += kLanes) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + k), gradient_lanes<with_z>(p, r, k, factor));
    }
  }
}

}  // namespace resnet_fused::cpu::bf16
#endif
