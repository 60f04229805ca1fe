// What Winograd's filtering transforms before it multiplies: the input of a block of tiles, and a panel of the weight.
#pragma once

#include <algorithm>
#include <cstdint>

#include "winograd.h"
#include "winograd_problem.h"

namespace resnet_fused::cpu {

// v: [values][tiles of the block][v_pitch], of the tiles `tiles` of a block. `zeros`: a pixel of the padding.
template <class L, class F>
RESNET_FUSED_INLINE void transform_inputs(const Problem& p, int64_t block, Problem::Range tiles, float* v,
                                          const float* zeros) {
  const int64_t plane = p.size(block) * p.v_pitch();
  Tile<F::outputs> tile(p, p.first_tile(block) + tiles.begin);
  for (int64_t t = tiles.begin; t < tiles.end; ++t, tile.advance(p)) {
    const int64_t top = tile.row - p.padding, left = tile.column - p.padding;
    const float* pixels[F::inputs][F::inputs];
    for (int64_t i = 0; i < F::inputs; ++i) {
      const int64_t h = top + i;
      const float* line = p.x + ((tile.sample * p.H + h) * p.W + left) * p.C;
      for (int64_t j = 0; j < F::inputs; ++j) {
        const bool inside = h >= 0 && h < p.H && left + j >= 0 && left + j < p.W;
        pixels[i][j] = inside ? line + j * p.C : zeros;
      }
    }
    transform_input<L, F>(v + t * p.v_pitch(), plane, pixels, p.C, kAhead * 2 * p.C);
  }
}

template <class L, class F>
RESNET_FUSED_INLINE void transform_inputs(const Problem& p, int64_t block, float* v, const float* zeros) {
  transform_inputs<L, F>(p, block, {0, p.size(block)}, v, zeros);
}

// taps[i][tap][k] = the weight's taps for the channels [c, c + channels) and the outputs [k, k + outputs), read in the
// order of memory, and a line that is read later fetched meanwhile: which channels lie far apart, in lines that compete
// for the same places of the cache.
template <int64_t panel, class Tap>
RESNET_FUSED_INLINE void gather_taps(const Problem& p, int64_t c, int64_t channels, int64_t k, int64_t outputs,
                                     Tap (*taps)[9][panel]) {
  const float* first = p.weight + k * p.stride_k + c * p.stride_c;
  const auto place = [&](int64_t tap) { return tap / 3 * p.stride_r + tap % 3 * p.stride_s; };
  if (p.stride_c <= p.stride_k) {
    for (int64_t j = 0; j < outputs; ++j) {
      for (int64_t tap = 0; tap < 9; ++tap) {
        const float* from = first + j * p.stride_k + place(tap);
        __builtin_prefetch(from + channels * p.stride_c);
        for (int64_t i = 0; i < channels; ++i) taps[i][tap][j] = from[i * p.stride_c];
      }
    }
    return;
  }
  for (int64_t i = 0; i < channels; ++i) {
    for (int64_t tap = 0; tap < 9; ++tap) {
      const float* from = first + i * p.stride_c + place(tap);
      for (int64_t j = 0; j < outputs; j += 16) __builtin_prefetch(from + 4 * p.stride_c + j * p.stride_k, 0, 2);
      for (int64_t j = 0; j < outputs; ++j) taps[i][tap][j] = from[j * p.stride_k];
    }
  }
}

// u: [values][C][u_pitch], planes u_plane apart, channels [begin, end) of one panel in it; zeros beyond the last output
// channel. `scale`: a factor of each output channel, applied to taps as Tap, or null.
template <class L, class F, class Tap>
RESNET_FUSED_INLINE void transform_weights(const Problem& p, int64_t panel, int64_t begin, int64_t end,
                                           const float* scale, float* u) {
  constexpr int64_t kChannels = 16;  // a cache line of a weight whose channels lie side by side
  const int64_t first = panel * L::panel, outputs = std::min(L::panel, p.K - first);
  Tap taps[kChannels][9][L::panel] = {};
  for (int64_t c = begin; c < end; c += kChannels) {
    const int64_t channels = std::min(kChannels, end - c);
    gather_taps<L::panel>(p, c, channels, first, outputs, taps);
    for (int64_t i = 0; i < channels; ++i) {
      for (int64_t tap = 0; scale && tap < 9; ++tap) {
        for (int64_t k = 0; k < outputs; ++k) taps[i][tap][k] *= scale[first + k];
      }
      transform_weight<L, F>(u + (c + i) * p.u_pitch, p.u_plane(), taps[i][0]);
    }
  }
}

}  // namespace resnet_fused::cpu
