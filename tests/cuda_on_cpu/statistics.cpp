// Batch statistics behind C functions that test_statistics.py calls through ctypes. dtype: 0 float, 1 half, 2 bfloat16.

#include "cuda_on_cpu.h"

#include "../../csrc/cuda/kernels/bn_stats.cuh"

using namespace resnet_fused;

extern "C" {

int64_t bn_stats_partial_floats(int64_t rows, int64_t channels) {
  return cuda::bn_stats_partial_floats({rows, channels, 1});
}

int bn_stats(int dtype, int64_t rows, int64_t channels, const void* z, float* partial, float* mean, float* m2) {
  const BnStatsParams p{{rows, channels, 1}, z, partial, {rows, channels, mean, m2, {}}};
  return cuda_on_cpu::with_type(dtype, [&](auto t) { cuda::launch_bn_stats<decltype(t)>(p, nullptr); });
}

void merge_moments(const float* partial, int64_t chunk_rows, int64_t rows, int64_t channels, float* mean, float* m2) {
  cuda::launch_merge_moments(partial, {rows, chunk_rows}, {rows, channels, mean, m2, {}}, nullptr);
}
}
