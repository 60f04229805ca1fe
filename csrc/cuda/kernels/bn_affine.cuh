// Batch norm of a tensor as a multiply-add, from its statistics: a thread a channel.
//
// Bytes: reads 8 a channel and gamma and beta, writes 20: 74 kB for 2048 channels, 22 ns at the 3.35 TB/s of an H100.
// What counts is the launch, which stands for about twenty of PyTorch's.
#pragma once

#include "affine.cuh"

namespace resnet_fused::cuda {

template <int kChannels>
__global__ void __launch_bounds__(kChannels) bn_affine_kernel(const BnAffineParams p) {
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kChannels + threadIdx.x;
  if (channel < p.channels) store_affine(p.affine, channel, p.rows, p.mean[channel], p.m2[channel]);
}

// Nothing is launched for no channels.
void launch_bn_affine(const BnAffineParams& p, cudaStream_t stream) {
  if (p.channels == 0) return;
  constexpr int kChannels = 128;
  const dim3 grid(static_cast<unsigned>((p.channels + kChannels - 1) / kChannels));
  RESNET_FUSED_LAUNCH(bn_affine_kernel<kChannels>, grid, dim3(kChannels), stream, p);
}

}  // namespace resnet_fused::cuda
