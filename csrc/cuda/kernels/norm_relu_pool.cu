// Compiles the kernels of norm_relu_pool, see ../launches.h.

#include "norm_relu_pool.cuh"

namespace resnet_fused::cuda {

template void launch_norm_relu_pool<float>(const NormReluPoolParams&, cudaStream_t);
template void launch_norm_relu_pool<__half>(const NormReluPoolParams&, cudaStream_t);
template void launch_norm_relu_pool<__nv_bfloat16>(const NormReluPoolParams&, cudaStream_t);

}  // namespace resnet_fused::cuda
