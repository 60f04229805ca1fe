// Compiles the kernels of conv1x1_wgrad, see ../launches.h.

#include "conv1x1_wgrad.cuh"

namespace resnet_fused::cuda {

template int conv1x1_wgrad_splits<float>(const Conv1x1WgradParams&);
template int conv1x1_wgrad_splits<__half>(const Conv1x1WgradParams&);
template int conv1x1_wgrad_splits<__nv_bfloat16>(const Conv1x1WgradParams&);
template void start_conv1x1_wgrad<float>(const Conv1x1WgradParams&, cudaStream_t);
template void start_conv1x1_wgrad<__half>(const Conv1x1WgradParams&, cudaStream_t);
template void start_conv1x1_wgrad<__nv_bfloat16>(const Conv1x1WgradParams&, cudaStream_t);
template void add_conv1x1_wgrad<float>(const Conv1x1WgradParams&, int, cudaStream_t);
template void add_conv1x1_wgrad<__half>(const Conv1x1WgradParams&, int, cudaStream_t);
template void add_conv1x1_wgrad<__nv_bfloat16>(const Conv1x1WgradParams&, int, cudaStream_t);

}  // namespace resnet_fused::cuda
