// The packed sign mask: [M, ceil(C/8)] uint8, channel c of a row is bit c % 8 of byte c / 8, unused bits 0.
#pragma once

#include <cstring>

#include "alloc.h"
#include "simd.h"

namespace resnet_fused::cpu {

inline int64_t mask_bytes(int64_t channels) { return (channels + 7) / 8; }

inline Tensor empty_mask(const Tensor& x) {
  const int64_t rows = x.size(0) * x.size(2) * x.size(3), bytes = mask_bytes(x.size(1));
  return empty_strided<2>({rows, bytes}, {bytes, 1}, ScalarType::Byte);
}

// Eight bytes of 0 or 1, the first in the lowest bits -> one byte. Bit 8i times 2^(7*(8-i)) lands on bit 56 + i.
RESNET_FUSED_INLINE uint8_t pack8(uint64_t bytes) {
  return static_cast<uint8_t>((bytes * 0x0102040810204080ull) >> 56);
}

// One byte -> eight bytes of 0 or 1: bit i of every copy is isolated, then moved to the bottom of byte i.
RESNET_FUSED_INLINE uint64_t unpack8(uint8_t byte) {
  const uint64_t isolated = (byte * 0x0101010101010101ull) & 0x8040201008040201ull;
  return ((isolated + 0x7F7F7F7F7F7F7F7Full) >> 7) & 0x0101010101010101ull;
}

inline constexpr int64_t kMaskTile = 64;

template <class T>
RESNET_FUSED_INLINE void pack_tile(uint8_t* __restrict mask, const T* __restrict x, int64_t count) {
  alignas(64) uint8_t keep[kMaskTile] = {};
  if (count == kMaskTile) {
    for (int64_t i = 0; i < kMaskTile; ++i) keep[i] = !(load(x + i) <= 0);
  } else {
    for (int64_t i = 0; i < count; ++i) keep[i] = !(load(x + i) <= 0);
  }
  for (int64_t i = 0; i < mask_bytes(count); ++i) {
    uint64_t word;
    std::memcpy(&word, keep + 8 * i, 8);
    mask[i] = pack8(word);
  }
}

// mask of `rows` rows of x, set where not (x <= 0)
template <class T>
RESNET_FUSED_CLONES void pack_rows(uint8_t* __restrict mask, const T* __restrict x, int64_t rows, int64_t C) {
  if (C % 8 == 0) {  // no unused bits: the rows are one long row
    C *= rows;
    rows = 1;
  }
  for (int64_t m = 0; m < rows; ++m, x += C, mask += mask_bytes(C)) {
    for (int64_t c = 0; c < C; c += kMaskTile) {
      const int64_t left = C - c;
      pack_tile(mask + c / 8, x + c, left < kMaskTile ? left : kMaskTile);
    }
  }
}

}  // namespace resnet_fused::cpu
