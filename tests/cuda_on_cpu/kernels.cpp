// The kernels behind C functions that test_kernels.py calls through ctypes. dtype: 0 float, 1 half, 2 bfloat16.

#include "cuda_on_cpu.h"

#include "../../csrc/cuda/kernels/lazy_grad_apply.cuh"
#include "../../csrc/cuda/kernels/norm_add_relu.cuh"
#include "../../csrc/cuda/kernels/norm_add_relu_backward.cuh"

using namespace resnet_fused;

extern "C" {

int norm_add_relu(int dtype, int64_t rows, int64_t channels, int64_t rows_per_sample, const void* z, const float* scale,
                  const float* shift, const void* residual, const float* residual_scale, const float* residual_shift,
                  const float* sample_factor, void* out, uint8_t* mask, bool relu) {
  const NormAddReluParams p{{rows, channels, rows_per_sample},
                            z,
                            scale,
                            shift,
                            residual,
                            residual_scale,
                            residual_shift,
                            sample_factor,
                            out,
                            mask,
                            relu};
  return cuda_on_cpu::with_type(dtype, [&](auto t) { cuda::launch_norm_add_relu<decltype(t)>(p, nullptr); });
}

int64_t partial_floats(int64_t rows, int64_t channels, bool residual) {
  return cuda::partial_floats({rows, channels, rows}, residual);
}

int norm_add_relu_backward(int dtype, int64_t rows, int64_t channels, int64_t rows_per_sample, const void* grad_out,
                           const void* z, const float* mean, const float* scale, const float* shift,
                           const uint8_t* mask_bits, const void* mask_output, const void* residual,
                           const float* residual_mean, const float* sample_factor, void* g, float* partial,
                           float* sum_g, float* sum_gz, float* residual_sum_g, float* residual_sum_gz) {
  const NormAddReluBackwardParams p{{rows, channels, rows_per_sample},
                                    grad_out,
                                    z,
                                    mean,
                                    scale,
                                    shift,
                                    mask_bits,
                                    mask_output,
                                    residual,
                                    residual_mean,
                                    sample_factor,
                                    g,
                                    partial,
                                    {sum_g, sum_gz, residual_sum_g, residual_sum_gz}};
  return cuda_on_cpu::with_type(dtype, [&](auto t) { cuda::launch_norm_add_relu_backward<decltype(t)>(p, nullptr); });
}

int lazy_grad_apply(int dtype, int64_t rows, int64_t channels, int64_t rows_per_sample, const void* g, const void* z,
                    const float* a, const float* b, const float* d, const float* scale, const float* shift,
                    const float* sample_factor, const void* residual, void* dz) {
  const LazyGradApplyParams p{
      {rows, channels, rows_per_sample}, g, z, a, b, d, scale, shift, sample_factor, residual, nullptr, dz};
  return cuda_on_cpu::with_type(dtype, [&](auto t) { cuda::launch_lazy_grad_apply<decltype(t)>(p, nullptr); });
}
}
