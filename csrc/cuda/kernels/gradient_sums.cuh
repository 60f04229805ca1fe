// The two sums of a gradient that batch norm's backward needs, per channel: of it, and of it times what it belongs to.
//
// Lanes add up what they store, as rounded; a warp's lanes and then a block's warps are added at the end of each tile,
// in order, to what the block has of its chunk of rows. A second launch adds the chunks in float64, without atomics,
// and goes on to batch norm's coefficients.
#pragma once

#include "../../gradient_params.h"
#include "affine.cuh"
#include "patch.cuh"

namespace resnet_fused::cuda {

constexpr int kGradientSums = 2;
constexpr int kAddChannels = 8, kAddChunks = 64;  // threads of a block; 8 floats are one 32-byte sector

// In shared memory: of each row of warps, and of the chunk so far, two sums of each channel of the tile.
template <class Shape>
struct TileSums {
  static constexpr int kWarpsDown = Shape::kTileRows / Shape::kWarpRows;
  static constexpr int kFloats = kGradientSums * Shape::kTileCols;
  static constexpr int kFoundBytes = kWarpsDown * kFloats * static_cast<int>(sizeof(float));
  static constexpr int kChunkBytes = kFloats * static_cast<int>(sizeof(float));

  float* found;  // kFoundBytes
  float* chunk;  // kChunkBytes; a thread's two are its own
};

// What each lane has of its eight channels of its rows.
struct LaneSums {
  float g[kGroup] = {}, gx[kGroup] = {};
};

// A warp's lanes, of which every fourth has the same channels.
template <class Shape>
__device__ inline void store_lane_sums(const LaneSums& sums, const TileSums<Shape>& to) {
  const int lane = Shape::lane();
  float* found =
      to.found + Shape::warp() / Shape::kWarpsAcross * TileSums<Shape>::kFloats + Shape::warp_col() + lane % 4 * kGroup;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const float g = sum_over_rows(sums.g[i]), gx = sum_over_rows(sums.gx[i]);
    if (lane / 4 != 0) continue;
    found[i] = g;
    found[i + Shape::kTileCols] = gx;
  }
}

// The warps' to the chunk's, which begins with this tile if it is `first`.
template <class Shape>
__device__ inline void add_to_chunk(const TileSums<Shape>& sums, bool first) {
  for (int i = anew(static_cast<int>(threadIdx.x)); i < TileSums<Shape>::kFloats; i += kConvThreads) {
    float sum = first ? 0.f : sums.chunk[i];
#pragma unroll
    for (int down = 0; down < TileSums<Shape>::kWarpsDown; ++down) {
      sum += sums.found[down * TileSums<Shape>::kFloats + i];
    }
    sums.chunk[i] = sum;
  }
}

// To `partial`, [chunks, 2, channels].
template <class Shape>
__device__ inline void store_chunk_sums(const TileSums<Shape>& sums, float* partial, int64_t chunk, int channels,
                                        int first_col) {
  for (int i = anew(static_cast<int>(threadIdx.x)); i < TileSums<Shape>::kFloats; i += kConvThreads) {
    const int channel = first_col + i % Shape::kTileCols;
    if (channel >= channels) continue;
    partial[(chunk * kGradientSums + i / Shape::kTileCols) * channels + channel] = sums.chunk[i];
  }
}

template <int kChannels, int kChunks>
__global__ void __launch_bounds__(kChannels* kChunks)
    add_gradient_sums_kernel(const float* partial, int chunks, const GradientSums to) {
  __shared__ double sums[kGradientSums][kChunks][kChannels];
  const int x = threadIdx.x, y = threadIdx.y;
  const int64_t channels = to.norm.channels, channel = static_cast<int64_t>(blockIdx.x) * kChannels + x;
  double found[kGradientSums] = {};
  for (int64_t chunk = channel < channels ? y : chunks; chunk < chunks; chunk += kChunks) {
#pragma unroll
    for (int s = 0; s < kGradientSums; ++s) found[s] += partial[(chunk * kGradientSums + s) * channels + channel];
  }
#pragma unroll
  for (int s = 0; s < kGradientSums; ++s) sums[s][y][x] = found[s];
  for (int half = kChunks / 2; half > 0; half /= 2) {
    __syncthreads();
    if (y < half) {
#pragma unroll
      for (int s = 0; s < kGradientSums; ++s) sums[s][y][x] += sums[s][y + half][x];
    }
  }
  if (y != 0 || channel >= channels) return;
  const float g = static_cast<float>(sums[0][0][x]), gx = static_cast<float>(sums[1][0][x]);
  to.sum_g[channel] = g;
  if (to.sum_gx) to.sum_gx[channel] = gx;
  if (to.norm.b) store_coefficients(to.norm, channel, g, gx);
}

// Of no chunks the sums are 0.
inline void launch_add_gradient_sums(const float* partial, int chunks, const GradientSums& to, cudaStream_t stream) {
  if (to.norm.channels == 0) return;
  const dim3 grid(static_cast<unsigned>((to.norm.channels + kAddChannels - 1) / kAddChannels));
  RESNET_FUSED_LAUNCH((add_gradient_sums_kernel<kAddChannels, kAddChunks>), grid, dim3(kAddChannels, kAddChunks),
                      stream, partial, chunks, to);
}

}  // namespace resnet_fused::cuda
