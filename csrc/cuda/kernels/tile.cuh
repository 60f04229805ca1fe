// What the pointwise kernels share: how a block covers a [rows, C] matrix, and eight channels of one row at a time.
//
// A thread owns one group of eight channels (16 bytes in 16-bit dtypes, one byte of a sign mask) and walks down rows,
// so that per-channel coefficients stay in its registers and no index is divided per element.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define RESNET_FUSED_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#define RESNET_FUSED_LAUNCH_SHARED(kernel, grid, block, bytes, stream, ...) \
  kernel<<<grid, block, bytes, stream>>>(__VA_ARGS__)
#define RESNET_FUSED_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif  // otherwise the including file has defined CUDA's names and these macros, see tests/cuda_on_cpu

#include "../../params.h"

namespace resnet_fused::cuda {

constexpr int kGroup = 8;      // channels per thread
constexpr int kThreads = 256;  // per block
constexpr int kMaxGroupsPerBlock = 32;

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ T from_float(float v);
template <>
__device__ inline float from_float<float>(float v) {
  return v;
}
template <>
__device__ inline __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// Two neighbours, rounded by one instruction where data have 16 bits.
template <class T>
__device__ inline void round_pair(T* to, float first, float second) {
#if defined(__CUDACC__)
  if constexpr (sizeof(T) == 2) {
    if constexpr (std::is_same_v<T, __half>) {
      *reinterpret_cast<__half2*>(to) = __floats2half2_rn(first, second);
    } else {
      *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(first, second);
    }
    return;
  }
#endif
  to[0] = from_float<T>(first);
  to[1] = from_float<T>(second);
}

// Eight channels of one row, as loaded.
template <class T>
struct alignas(16) Group {
  T v[kGroup];
};

// Channels [first, first + count) of this thread's group; count < 8 only at the ragged end of a row.
struct Channels {
  int64_t first;
  int count;
};

// Vectors: C % 8 == 0 and 16-byte aligned bases, so that every group is whole and aligned.
template <bool kVectors, class T>
__device__ inline Group<T> load(const void* base, int64_t row, int64_t row_channels, Channels c) {
  const T* p = static_cast<const T*>(base) + row * row_channels + c.first;
  Group<T> group;
  if constexpr (kVectors) {
    constexpr int kParts = sizeof(group) / 16;
#pragma unroll
    for (int i = 0; i < kParts; ++i) reinterpret_cast<uint4*>(&group)[i] = reinterpret_cast<const uint4*>(p)[i];
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) group.v[i] = i < c.count ? p[i] : from_float<T>(0.f);
  }
  return group;
}

// As load(), zeros where that row is not there.
template <bool kVectors, class T>
__device__ inline Group<T> load_if(bool there, const void* base, int64_t row, int64_t row_channels, Channels c) {
  if (there) return load<kVectors, T>(base, row, row_channels, c);
  Group<T> group;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) group.v[i] = from_float<T>(0.f);
  return group;
}

template <bool kVectors, class T>
__device__ inline void store(void* base, int64_t row, int64_t row_channels, Channels c, const Group<T>& group) {
  T* p = static_cast<T*>(base) + row * row_channels + c.first;
  if constexpr (kVectors) {
    constexpr int kParts = sizeof(group) / 16;
#pragma unroll
    for (int i = 0; i < kParts; ++i) reinterpret_cast<uint4*>(p)[i] = reinterpret_cast<const uint4*>(&group)[i];
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (i < c.count) p[i] = group.v[i];
    }
  }
}

// This thread's part of a per-channel vector, `absent` where there is none.
__device__ inline void load_coefficients(float (&to)[kGroup], const float* vector, Channels c, float absent) {
#pragma unroll
  for (int i = 0; i < kGroup; ++i) to[i] = vector && i < c.count ? vector[c.first + i] : absent;
}

// How blocks cover the matrix: `groups` threads across channels and kThreads / groups rows down, blockIdx.y across
// channels and blockIdx.x down rows with a stride of the grid. It depends on the shape alone, so results do too.
struct Tiling {
  int groups;          // threads across, a power of two
  int64_t tiles;       // blocks across
  int64_t row_blocks;  // blocks down

  Tiling(const Extent& e, int64_t max_blocks, int64_t rows_per_thread) : groups(1) {
    const int64_t all = (e.channels + kGroup - 1) / kGroup;
    while (groups < all && groups < kMaxGroupsPerBlock) groups *= 2;
    tiles = (all + groups - 1) / groups;
    const int64_t rows_per_block = rows_per_thread * (kThreads / groups);
    row_blocks = (e.rows + rows_per_block - 1) / rows_per_block;
    const int64_t limit = max_blocks / tiles > 1 ? max_blocks / tiles : 1;
    if (row_blocks > limit) row_blocks = limit;
  }

  dim3 block() const { return dim3(groups, kThreads / groups); }
  // Blocks down lie in x, which may count to 2^31 (y only to 65535); a tile is 256 channels, so y suffices for them.
  dim3 grid() const { return dim3(static_cast<unsigned>(row_blocks), static_cast<unsigned>(tiles)); }
};

__device__ inline Channels my_channels(int64_t channels) {
  const int64_t first = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * kGroup;
  const int64_t left = channels - first;
  return {first, static_cast<int>(left < 0 ? 0 : left < kGroup ? left : kGroup)};
}

__device__ inline int64_t first_row() { return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; }
__device__ inline int64_t row_step() { return static_cast<int64_t>(gridDim.x) * blockDim.y; }

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace resnet_fused::cuda
