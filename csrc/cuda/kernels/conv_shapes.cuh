// Which tile a convolution is cut into, how many blocks an SM has room for, and how many a launch has.
#pragma once

#include <type_traits>

#include "conv_tile.cuh"

namespace resnet_fused::cuda {

// Registers suffice for two of the largest tiles, shared memory (164 KB or more but on sm_86, 89 and 120, with 100) for
// one to three.
template <class Shape>
constexpr int conv_blocks_per_sm() {
  return Shape::kTileRows * Shape::kTileCols <= 64 * 64 ? 3 : 2;
}

template <class Shape>
int tiles_down(const ConvGeometry& g) {
  const int64_t pixels = static_cast<int64_t>(g.n) * g.p * g.q;
  return static_cast<int>((pixels + Shape::kTileRows - 1) / Shape::kTileRows);
}

template <class Shape>
int tiles_across(const ConvGeometry& g) {
  return (g.k + Shape::kTileCols - 1) / Shape::kTileCols;
}

template <class Shape>
int64_t tiles_of(const ConvGeometry& g) {
  return static_cast<int64_t>(tiles_down<Shape>(g)) * tiles_across<Shape>(g);
}

// How blocks, as many as the GPU holds or as there is work for, take tiles in turn, those of the same pixels one after
// another. Nothing is divided on the way: what the compiler would keep for that costs registers.
struct TileWalk {
  int blocks, across;          // of a launch; tiles of the same pixels
  int step_down, step_across;  // from a block's tile to its next

  TileWalk(int64_t down, int across_, int blocks_per_sm) : across(across_) {
    const int64_t room = static_cast<int64_t>(multiprocessors()) * blocks_per_sm, work = down * across;
    blocks = static_cast<int>(work < room ? work : room);
    step_down = blocks / across;
    step_across = blocks % across;
  }
};

// A block's tile.
struct TilePlace {
  int down, across;

  __device__ explicit TilePlace(const TileWalk& walk)
      : down(static_cast<int>(blockIdx.x) / walk.across), across(static_cast<int>(blockIdx.x) % walk.across) {}
  __device__ void advance(const TileWalk& walk) {
    down += walk.step_down;
    across += walk.step_across;
    if (across < walk.across) return;
    across -= walk.across;
    ++down;
  }
};

// f(Shape{}, whether chunks of 16 bytes are whole): the largest tiles that still give every SM one, as they read least
// per product. `aligned`: whether all tensors lie at multiples of 16 bytes. For a result that is not empty.
template <class T, class F>
void with_conv_shape(const ConvGeometry& g, bool aligned, const F& f) {
  const bool whole = g.c > 0 && g.c % kChunkElements<T> == 0 && g.k % kGroup == 0;
  if (!whole || !aligned) return f(TileShape<128, 64>{}, std::false_type{});
  const int64_t sms = multiprocessors();
  if constexpr (sizeof(T) == 2) {  // of 32 bits the largest tile lacks registers
    if (g.k > 64 && tiles_of<TileShape<128, 128>>(g) >= sms) return f(TileShape<128, 128>{}, std::true_type{});
  }
  if (tiles_of<TileShape<128, 64>>(g) >= sms) return f(TileShape<128, 64>{}, std::true_type{});
  f(TileShape<64, 64>{}, std::true_type{});
}

}  // namespace resnet_fused::cuda
