// Compiles the kernels of norm_add_relu_backward, see ../launches.h.

#include "norm_add_relu_backward.cuh"

namespace resnet_fused::cuda {

template void launch_norm_add_relu_backward<float>(const NormAddReluBackwardParams&, cudaStream_t);
template void launch_norm_add_relu_backward<__half>(const NormAddReluBackwardParams&, cudaStream_t);
template void launch_norm_add_relu_backward<__nv_bfloat16>(const NormAddReluBackwardParams&, cudaStream_t);

}  // namespace resnet_fused::cuda
