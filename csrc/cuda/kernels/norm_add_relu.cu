// Compiles the kernels of norm_add_relu, see ../launches.h.

#include "norm_add_relu.cuh"

namespace resnet_fused::cuda {

template void launch_norm_add_relu<float>(const NormAddReluParams&, cudaStream_t);
template void launch_norm_add_relu<__half>(const NormAddReluParams&, cudaStream_t);
template void launch_norm_add_relu<__nv_bfloat16>(const NormAddReluParams&, cudaStream_t);

}  // namespace resnet_fused::cuda
