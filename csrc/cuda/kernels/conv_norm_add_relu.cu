// Compiles the kernels of conv_norm_add_relu, see ../launches.h.

#include "conv_norm_add_relu.cuh"

namespace resnet_fused::cuda {

template void launch_conv_norm_add_relu<float>(const ConvNormAddReluParams&, cudaStream_t);
template void launch_conv_norm_add_relu<__half>(const ConvNormAddReluParams&, cudaStream_t);
template void launch_conv_norm_add_relu<__nv_bfloat16>(const ConvNormAddReluParams&, cudaStream_t);

}  // namespace resnet_fused::cuda
