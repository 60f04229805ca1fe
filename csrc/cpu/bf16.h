// Products of bfloat16 rows by AVX-512's vdpbf16ps, which adds two neighbouring products to a float32 sum: what 1x1
// convolutions in bfloat16 are made of.
//
// A pair of neighbouring channels of a row is the 32 bits that it broadcasts; of the other factor, two rows lie
// interleaved. Sums are float32, in the order of the pairs. Like every product of these instructions, and oneDNN's,
// subnormal numbers count as 0.
#pragma once

#include "../cpu_levels.h"

#ifdef RESNET_FUSED_TARGET_BF16
#if defined(__GNUC__) && __GNUC__ < 13
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of its own header's intrinsics, which leave lanes undefined
#endif
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define RESNET_FUSED_BF16 __attribute__((RESNET_FUSED_TARGET_BF16))
#define RESNET_FUSED_BF16_INLINE inline __attribute__((always_inline, RESNET_FUSED_TARGET_BF16))
// A group of rows' products and what is done with them: by itself, since in a function of many such loops GCC 12 spills
// sums that have registers of their own in this one.
#define RESNET_FUSED_BF16_GROUP __attribute__((noinline, RESNET_FUSED_TARGET_BF16))

namespace resnet_fused::cpu::bf16 {

inline constexpr int64_t kLanes = 16, kPanel = 32;  // sums in a vector; columns of a panel, two vectors
inline constexpr int64_t kGroup = 14;               // rows whose sums the registers hold

// Elements between rows of a scratch: whole cache lines, and one more, so that no rows lie a power of two apart.
inline int64_t pitch_of(int64_t channels) { return (channels + kPanel - 1) / kPanel * kPanel + kPanel; }
inline int64_t padded(int64_t channels) { return (channels + kPanel - 1) / kPanel * kPanel; }
inline int64_t pairs_of(int64_t depth) { return (depth + 1) / 2; }

RESNET_FUSED_BF16_INLINE __m512 widen(__m256i v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}
// The first `count` lanes, at most all.
RESNET_FUSED_BF16_INLINE __mmask16 lanes_of(int64_t count) {
  return count >= kLanes ? 0xFFFF : count > 0 ? static_cast<__mmask16>((1u << count) - 1) : 0;
}
RESNET_FUSED_BF16_INLINE __mmask32 columns_of(int64_t count) {
  return count >= kPanel ? 0xFFFFFFFFu : static_cast<__mmask32>((1u << count) - 1);
}
// The lanes that are there, all if `full`; zeros else.
template <bool full = false>
RESNET_FUSED_BF16_INLINE __m512 load_wide(__mmask16 lanes, const uint16_t* p) {
  if (full) return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return widen(_mm256_maskz_loadu_epi16(lanes, p));
}
template <bool full>
RESNET_FUSED_BF16_INLINE __m512 load_floats(__mmask16 lanes, const float* p) {
  return full ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(lanes, p);
}
RESNET_FUSED_BF16_INLINE __m512i round_pair(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
RESNET_FUSED_BF16_INLINE __m512 low_of(__m512i v) { return widen(_mm512_castsi512_si256(v)); }
RESNET_FUSED_BF16_INLINE __m512 high_of(__m512i v) { return widen(_mm512_extracti64x4_epi64(v, 1)); }
RESNET_FUSED_BF16_INLINE void store_columns(uint16_t* p, __mmask32 columns, __m512i v) {
  if (columns == 0xFFFFFFFFu) {
    _mm512_storeu_si512(p, v);
  } else {
    _mm512_mask_storeu_epi16(p, columns, v);
  }
}
RESNET_FUSED_BF16_INLINE __m512i load_columns(__mmask32 columns, const uint16_t* p) {
  return columns == 0xFFFFFFFFu ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16(columns, p);
}

// Lines that are to be read later, fetched a few at a time into the second-level cache between products.
struct Ahead {
  const char* next = nullptr;
  int64_t left = 0, step = 0;  // bytes, and at a time

  Ahead() = default;
  // `times`: how often it will be called.
  Ahead(const uint16_t* first, int64_t elements, int64_t times)
      : next(reinterpret_cast<const char*>(first)), left(2 * elements), step((left / times + 64) / 64 * 64) {}

  RESNET_FUSED_BF16_INLINE void operator()() {
    const int64_t now = left < step ? left : step;
    for (int64_t i = 0; i < now; i += 64) _mm_prefetch(next + i, _MM_HINT_T1);
    next += now, left -= now;
  }
};

// sums[r] += the products of the rows a[r], `pitch` elements apart, with a panel of as many pairs of rows.
template <int64_t R>
RESNET_FUSED_BF16_INLINE void multiply(const uint16_t* a, int64_t pitch, const uint16_t* panel, int64_t pairs,
                                       __m512 (&sums)[R][2]) {
  constexpr int64_t kAhead = 12;  // lines of the panel, on their way from the second-level cache
  for (int64_t i = 0; i < pairs; ++i, panel += 2 * kPanel) {
    const __m512bh first = (__m512bh)_mm512_loadu_si512(panel), second = (__m512bh)_mm512_loadu_si512(panel + kPanel);
    _mm_prefetch(reinterpret_cast<const char*>(panel + 2 * kPanel * kAhead), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(panel + 2 * kPanel * kAhead + kPanel), _MM_HINT_T0);
#pragma GCC unroll 16
    for (int64_t r = 0; r < R; ++r) {
      int32_t pair;
      std::memcpy(&pair, a + r * pitch + 2 * i, 4);
      const __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
      sums[r][0] = _mm512_dpbf16_ps(sums[r][0], value, first);
      sums[r][1] = _mm512_dpbf16_ps(sums[r][1], value, second);
    }
  }
}

// Two rows, interleaved: a panel's pair of rows.
RESNET_FUSED_BF16_INLINE __m512i interleaved(__m256i first, __m256i second) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
}
RESNET_FUSED_BF16_INLINE void interleave(__m512i first, __m512i second, uint16_t* out) {
  _mm512_storeu_si512(out, interleaved(_mm512_castsi512_si256(first), _mm512_castsi512_si256(second)));
  _mm512_storeu_si512(out + kPanel,
                      interleaved(_mm512_extracti64x4_epi64(first, 1), _mm512_extracti64x4_epi64(second, 1)));
}

// R outputs of a panel of the weight's gradient, from as many pairs of rows of both; added to what is there.
template <int64_t R>
RESNET_FUSED_BF16_GROUP void weight_group(const uint16_t* gradient, const uint16_t* activation, int64_t pairs, bool add,
                                          float* weight) {
  __m512 products[R][2] = {};
#pragma GCC unroll 16
  for (int64_t r = 0; r < R; ++r) {
    _mm_prefetch(reinterpret_cast<const char*>(weight + r * kPanel), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(weight + r * kPanel + kLanes), _MM_HINT_T0);
  }
  for (int64_t i = 0; i < pairs; ++i, gradient += 2 * kLanes, activation += 2 * kPanel) {
    const __m512bh first = (__m512bh)_mm512_loadu_si512(activation);
    const __m512bh second = (__m512bh)_mm512_loadu_si512(activation + kPanel);
#pragma GCC unroll 16
    for (int64_t r = 0; r < R; ++r) {
      int32_t pair;
      std::memcpy(&pair, gradient + 2 * r, 4);
      const __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
      products[r][0] = _mm512_dpbf16_ps(products[r][0], value, first);
      products[r][1] = _mm512_dpbf16_ps(products[r][1], value, second);
    }
  }
#pragma GCC unroll 16
  for (int64_t r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int64_t j = 0; j < 2; ++j) {
      float* const at = weight + r * kPanel + j * kLanes;
      _mm512_storeu_ps(at, add ? _mm512_add_ps(_mm512_loadu_ps(at), products[r][j]) : products[r][j]);
    }
  }
}

template <int64_t R>
RESNET_FUSED_BF16_INLINE void weight_group_of(int64_t count, const uint16_t* gradient, const uint16_t* activation,
                                              int64_t pairs, bool add, float* weight) {
  if constexpr (R > 0) {
    if (count == R) return weight_group<R>(gradient, activation, pairs, add, weight);
    weight_group_of<R - 1>(count, gradient, activation, pairs, add, weight);
  }
}

// packed[panel][pair][kPanel][2] of w[k * depth_stride + column], columns side by side, zeros beyond the last of each.
RESNET_FUSED_BF16 inline void pack_rows(const uint16_t* w, int64_t columns, int64_t depth, int64_t depth_stride,
                                        uint16_t* packed) {
  const __mmask32 mask = columns_of(columns);
  for (int64_t k = 0; k < depth; k += 2, packed += 2 * kPanel) {
    const __m512i first = load_columns(mask, w + k * depth_stride);
    const __m512i second = k + 1 < depth ? load_columns(mask, w + (k + 1) * depth_stride) : _mm512_setzero_si512();
    interleave(first, second, packed);
  }
}

// The same of w[column * column_stride + k]: pairs as they lie.
inline void pack_columns(const uint16_t* w, int64_t columns, int64_t column_stride, int64_t depth, uint16_t* packed) {
  constexpr int64_t kLines = 16;  // pairs at a time: a cache line of each column
  const int64_t whole = depth / 2;
  uint32_t* const out = reinterpret_cast<uint32_t*>(packed);
  for (int64_t i = 0; i < whole; i += kLines) {
    const int64_t lines = whole - i < kLines ? whole - i : kLines;
    for (int64_t j = 0; j < kPanel; ++j) {
      for (int64_t line = 0; line < lines; ++line) {
        uint32_t pair = 0;
        if (j < columns) std::memcpy(&pair, w + j * column_stride + 2 * (i + line), 4);
        out[(i + line) * kPanel + j] = pair;
      }
    }
  }
  for (int64_t j = 0; depth % 2 && j < kPanel; ++j) {
    out[whole * kPanel + j] = j < columns ? w[j * column_stride + depth - 1] : 0;
  }
}

}  // namespace resnet_fused::cpu::bf16
#endif
