// Mean and centred second moment per channel from partial ones, merged by Chan's rule (Chan, Golub, LeVeque 1979):
// what kernels share that take statistics of the rows they read or write.
//
// A partial is of a chunk of consecutive rows: an origin near its data, the sum of the differences from that, and the
// sum of their squares, [chunks, 3, C] in float32. Nothing cancels that data could choose: with the mean of T of a
// chunk's R rows as its origin, the squares about it are at most 1 + R/T times those about the chunk's own mean, and
// differences from it are exact where the mean is large. Chunks are merged in float64 about the first one's origin, by
// one read of their sums: the squares about that are at most 1 + rows/T times the result. Chunks are of the same rows
// and come in the same order whenever the shape is the same, and there are no atomics.
#pragma once

#include "affine.cuh"
#include "fold.cuh"

namespace resnet_fused::cuda {

constexpr int kMoments = 3;                           // of a partial: origin, sum, squares
constexpr int kMergeChannels = 8, kMergeChunks = 64;  // threads of a block; 8 floats are one 32-byte sector

// All rows in chunks of `rows`, but for the last.
struct RowChunks {
  int64_t rows, count;
  RowChunks(int64_t all, int64_t each) : rows(each), count(all == 0 ? 0 : (all + each - 1) / each) {}
};

// A chunk for each block down, of whole visits of that block.
inline RowChunks chunks_of(const Extent& e, const Tiling& t) {
  if (e.rows == 0) return {0, 0};
  const int64_t visit = kThreads / t.groups, blocks = t.row_blocks * visit;
  return {e.rows, (e.rows + blocks - 1) / blocks * visit};
}

// The mean of what a block's threads bring for each of their channels, of the first `rows` threads down: an origin of
// the chunk that these rows are of. 0 where it is not finite, so that NaN and infinity stay in the sums that they are
// in.
template <class T>
__device__ inline void block_origin(float (&origin)[kGroup], const Group<T>& mine, int rows) {
  __shared__ float shared[kThreads * kGroup];
  const int across = blockDim.x * kGroup;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) shared[threadIdx.y * across + i * blockDim.x + threadIdx.x] = to_float(mine.v[i]);
  __syncthreads();
  for (int i = threadIdx.y; i < kGroup; i += blockDim.y) {
    const int column = i * blockDim.x + threadIdx.x;  // this thread alone reads it, and writes the mean over the first
    float total = 0.f;
    for (int y = 0; y < rows; ++y) total += shared[y * across + column];
    shared[column] = finite_or_zero(total / static_cast<float>(rows));
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kGroup; ++i) origin[i] = shared[i * blockDim.x + threadIdx.x];
}

template <int kChannels, int kChunks>
__global__ void __launch_bounds__(kChannels* kChunks)
    merge_moments_kernel(const float* partial, const RowChunks chunks, const StatisticsParams found) {
  __shared__ double totals[kChunks][kChannels], squares[kChunks][kChannels];
  const int x = threadIdx.x, y = threadIdx.y;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kChannels + x;
  const bool there = channel < found.channels;
  const double origin = there && chunks.count > 0 ? partial[channel] : 0.f;
  double total = 0., square = 0.;  // of the differences from `origin`
  for (int64_t chunk = there ? y : chunks.count; chunk < chunks.count; chunk += kChunks) {
    const float* at = partial + chunk * kMoments * found.channels + channel;
    const int64_t left = found.rows - chunk * chunks.rows;
    const double rows = static_cast<double>(left < chunks.rows ? left : chunks.rows);
    const double away = at[0] - origin, sum = at[found.channels], more = rows * away;
    total += sum + more;
    square += at[2 * found.channels] + away * (2. * sum + more);
  }
  totals[y][x] = total;
  squares[y][x] = square;
  for (int half = kChunks / 2; half > 0; half /= 2) {
    __syncthreads();
    if (y < half) {
      totals[y][x] += totals[y + half][x];
      squares[y][x] += squares[y + half][x];
    }
  }
  if (y != 0 || !there) return;
  const double rows = static_cast<double>(found.rows), mean = found.rows > 0 ? totals[0][x] / rows : 0.;
  const double m2 = squares[0][x] - totals[0][x] * mean;
  store_statistics(found, channel, static_cast<float>(origin + mean), m2 < 0. ? 0.f : static_cast<float>(m2));
}

// Merge `partial` and store what it makes. Of no rows there are no chunks, and nothing is read.
inline void launch_merge_moments(const float* partial, const RowChunks& chunks, const StatisticsParams& found,
                                 cudaStream_t stream) {
  if (found.channels == 0) return;
  const dim3 grid(static_cast<unsigned>((found.channels + kMergeChannels - 1) / kMergeChannels));
  RESNET_FUSED_LAUNCH((merge_moments_kernel<kMergeChannels, kMergeChunks>), grid, dim3(kMergeChannels, kMergeChunks),
                      stream, partial, chunks, found);
}

}  // namespace resnet_fused::cuda
