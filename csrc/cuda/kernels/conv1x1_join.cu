// Compiles the kernels of conv1x1_join, see ../launches.h.

#include "conv1x1_join.cuh"

namespace resnet_fused::cuda {

template void launch_conv1x1_join<float>(const Conv1x1JoinParams&, cudaStream_t);
template void launch_conv1x1_join<__half>(const Conv1x1JoinParams&, cudaStream_t);
template void launch_conv1x1_join<__nv_bfloat16>(const Conv1x1JoinParams&, cudaStream_t);

}  // namespace resnet_fused::cuda
