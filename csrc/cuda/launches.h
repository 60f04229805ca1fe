// The launches that nvcc compiles in kernels/<op>.cu, for the ops, which a C++ compiler does. So nvcc, which reads a
// source once for each architecture, never reads torch's headers: that took most of its time.
#pragma once

#if !defined(RESNET_FUSED_LAUNCH)  // otherwise CUDA's names are there already
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include "../gradient_params.h"
#include "../params.h"

namespace resnet_fused::cuda {

void launch_bn_affine(const BnAffineParams& p, cudaStream_t stream);
void launch_bn_coefficients(const BnCoefficientsParams& p, cudaStream_t stream);

// T: float, __half or __nv_bfloat16.
template <class T>
void launch_bn_stats(const BnStatsParams& p, cudaStream_t stream);
template <class T>
void launch_conv1x1(const Conv1x1Params& p, cudaStream_t stream);
template <class T>
void launch_conv1x1_dgrad(const Conv1x1DgradParams& p, cudaStream_t stream);
template <class T>
void start_conv1x1_wgrad(const Conv1x1WgradParams& p, cudaStream_t stream);
template <class T>
void add_conv1x1_wgrad(const Conv1x1WgradParams& p, int splits, cudaStream_t stream);
template <class T>
void launch_conv1x1_join(const Conv1x1JoinParams& p, cudaStream_t stream);
template <class T>
void launch_conv_norm_add_relu(const ConvNormAddReluParams& p, cudaStream_t stream);
template <class T>
void launch_gram(const GramParams& p, cudaStream_t stream);
template <class T>
void launch_gram_grad(const GramGradParams& p, cudaStream_t stream);
template <class T>
void launch_gram_norm(const GramNormParams& p, cudaStream_t stream);
template <class T>
void launch_lazy_grad_apply(const LazyGradApplyParams& p, cudaStream_t stream);
template <class T>
void launch_norm_add_relu(const NormAddReluParams& p, cudaStream_t stream);
template <class T>
void launch_norm_add_relu_backward(const NormAddReluBackwardParams& p, cudaStream_t stream);
template <class T>
void launch_norm_relu_pool(const NormReluPoolParams& p, cudaStream_t stream);
template <class T>
void launch_norm_relu_pool_apply(const NormReluPoolApplyParams& p, cudaStream_t stream);
template <class T>
void launch_norm_relu_pool_backward(const NormReluPoolBackwardParams& p, cudaStream_t stream);

// Floats of scratch memory that a launch needs.
int64_t bn_stats_partial_floats(const Extent& e);
int64_t partial_floats(const Extent& e, bool residual);  // norm_add_relu_backward
int64_t pool_partial_floats(const PoolGeometry& g);
template <class T>
int64_t conv1x1_partial_floats(const Conv1x1Params& p);
template <class T>
int64_t conv1x1_dgrad_partial_floats(const Conv1x1DgradParams& p);
template <class T>
int64_t gram_partial_floats(const GramParams& p);
int64_t gram_grad_scratch_floats(int outputs, int channels);

// How many parts the rows of a weight's gradient are split into.
template <class T>
int conv1x1_wgrad_splits(const Conv1x1WgradParams& p);

}  // namespace resnet_fused::cuda
