// The values of 1x1 convolutions in bfloat16, applied on load in float32 and rounded, as stock rounds what it writes,
// into rows that products read.
#pragma once

#include "bf16.h"

#ifdef RESNET_FUSED_BF16
#include "bits.h"
#include "pixels.h"

namespace resnet_fused::cpu::bf16 {

// x^ of lazy.py: x, or relu(scale*x + shift), at the pixels of a stride.
struct Activation {
  const uint16_t* x;           // [rows, C]
  const float *scale, *shift;  // [C], or both null: x itself
  int64_t C;
  Pixels pixels;
};

// Rows [row, row + rows) of x^ as rows of the scratch, zeros up to whole panels. NaN and -0.0 pass.
RESNET_FUSED_BF16_INLINE void write_activation(const Activation& a, int64_t row, int64_t rows, uint16_t* out) {
  const int64_t pitch = pitch_of(a.C), width = padded(a.C);
  for (int64_t r = 0; r < rows; ++r, out += pitch) {
    const uint16_t* x = a.x + a.pixels.source(row + r) * a.C;
    for (int64_t c = 0; c < width; c += kPanel) {
      const __mmask32 columns = columns_of(a.C - c);
      __m512i value = load_columns(columns, x + c);
      if (a.scale) {
        const __mmask16 low = static_cast<__mmask16>(columns), high = static_cast<__mmask16>(columns >> 16);
        const __m512 first = _mm512_fmadd_ps(low_of(value), _mm512_maskz_loadu_ps(low, a.scale + c),
                                             _mm512_maskz_loadu_ps(low, a.shift + c));
        const __m512 second = _mm512_fmadd_ps(high_of(value), _mm512_maskz_loadu_ps(high, a.scale + c + kLanes),
                                              _mm512_maskz_loadu_ps(high, a.shift + c + kLanes));
        const __m512 zero = _mm512_setzero_ps();  // the first operand: the second is what passes where either is NaN
        value = round_pair(_mm512_max_ps(zero, first), _mm512_max_ps(zero, second));
      }
      _mm512_storeu_si512(out + c, value);
    }
  }
}

}  // namespace resnet_fused::cpu::bf16
#endif
