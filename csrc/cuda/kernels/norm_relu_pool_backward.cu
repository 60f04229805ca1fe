// Compiles the kernels of norm_relu_pool_backward, see ../launches.h.

#include "norm_relu_pool_backward.cuh"

namespace resnet_fused::cuda {

template void launch_norm_relu_pool_backward<float>(const NormReluPoolBackwardParams&, cudaStream_t);
template void launch_norm_relu_pool_backward<__half>(const NormReluPoolBackwardParams&, cudaStream_t);
template void launch_norm_relu_pool_backward<__nv_bfloat16>(const NormReluPoolBackwardParams&, cudaStream_t);

}  // namespace resnet_fused::cuda
