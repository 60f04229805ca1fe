// Compiles the kernels of norm_relu_pool_apply, see ../launches.h.

#include "norm_relu_pool_apply.cuh"

namespace resnet_fused::cuda {

template void launch_norm_relu_pool_apply<float>(const NormReluPoolApplyParams&, cudaStream_t);
template void launch_norm_relu_pool_apply<__half>(const NormReluPoolApplyParams&, cudaStream_t);
template void launch_norm_relu_pool_apply<__nv_bfloat16>(const NormReluPoolApplyParams&, cudaStream_t);

}  // namespace resnet_fused::cuda
