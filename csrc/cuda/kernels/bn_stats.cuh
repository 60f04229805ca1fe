// Mean and centred second moment per channel, or what batch norm makes of them: one read of z, in two launches.
//
// Bytes per element of b bytes: reads z (b); the first rows of each chunk, whose mean is its origin, stay in registers.
// Partials are 12 bytes per channel and chunk, written and read once, of at most 1024 blocks of up to 256 channels
// each: 3 MB a way however large z is. The stem of ResNet-50, bf16 [256, 64, 112, 112], is 411 MB: at least 0.12 ms at
// the 3.35 TB/s of an H100, the partials of its 1024 blocks 0.8 MB.
#pragma once

#include "moments.cuh"

namespace resnet_fused::cuda {

inline Tiling bn_stats_tiling(const Extent& extent) { return Tiling(extent, 1024, 8); }
inline RowChunks bn_stats_chunks(const Extent& extent) {
  return extent.channels == 0 ? RowChunks(0, 0) : chunks_of(extent, bn_stats_tiling(extent));
}
int64_t bn_stats_partial_floats(const Extent& e) { return bn_stats_chunks(e).count * kMoments * e.channels; }

template <class T, bool kVectors>
__global__ void __launch_bounds__(kThreads) bn_stats_kernel(const BnStatsParams p, int64_t chunk_rows) {
  const Channels c = my_channels(p.extent.channels);
  const int64_t start = blockIdx.x * chunk_rows, left = p.extent.rows - start;
  const int64_t rows = left < chunk_rows ? left : chunk_rows;
  // A thread beyond the last channel has no row to visit, but must take part in what the block does together.
  const int64_t end = start + (c.count ? rows : 0);
  int64_t row = start + threadIdx.y;
  Group<T> group = load_if<kVectors, T>(row < end, p.z, row, p.extent.channels, c);
  float origin[kGroup], sum[kMoments][kGroup] = {};
  const int first_rows = blockDim.y;
  block_origin(origin, group, rows < first_rows ? static_cast<int>(rows) : first_rows);
  while (row < end) {
    const int64_t next = row + blockDim.y;
    const Group<T> ahead = load_if<kVectors, T>(next < end, p.z, next, p.extent.channels, c);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const float away = to_float(group.v[i]) - origin[i];
      sum[1][i] += away;
      sum[2][i] = fmaf(away, away, sum[2][i]);
    }
    group = ahead;
    row = next;
  }
#pragma unroll
  for (int i = 0; i < kGroup; ++i) sum[0][i] = threadIdx.y == 0 ? origin[i] : 0.f;  // which folding leaves as it is
  fold_block<kMoments>(sum, p.partial, p.extent.channels, c);
}

template <class T, bool kVectors>
void bn_stats_first_stage(const BnStatsParams& p, cudaStream_t stream) {
  const Tiling t = bn_stats_tiling(p.extent);
  const RowChunks chunks = bn_stats_chunks(p.extent);
  const dim3 grid(static_cast<unsigned>(chunks.count), static_cast<unsigned>(t.tiles));
  RESNET_FUSED_LAUNCH((bn_stats_kernel<T, kVectors>), grid, t.block(), stream, p, chunks.rows);
}

// T: float, __half or __nv_bfloat16. Of no rows only the second stage is launched, of no channels nothing.
template <class T>
void launch_bn_stats(const BnStatsParams& p, cudaStream_t stream) {
  if (p.extent.channels == 0) return;
  if (p.extent.rows > 0) {
    const bool vectors = p.extent.channels % kGroup == 0 && aligned(p.z);
    vectors ? bn_stats_first_stage<T, true>(p, stream) : bn_stats_first_stage<T, false>(p, stream);
  }
  launch_merge_moments(p.partial, bn_stats_chunks(p.extent), p.found, stream);
}

}  // namespace resnet_fused::cuda
