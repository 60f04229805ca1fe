// Compiles the kernels of conv1x1_dgrad, see ../launches.h.

#include "conv1x1_dgrad.cuh"

namespace resnet_fused::cuda {

template void launch_conv1x1_dgrad<float>(const Conv1x1DgradParams&, cudaStream_t);
template void launch_conv1x1_dgrad<__half>(const Conv1x1DgradParams&, cudaStream_t);
template void launch_conv1x1_dgrad<__nv_bfloat16>(const Conv1x1DgradParams&, cudaStream_t);
template int64_t conv1x1_dgrad_partial_floats<float>(const Conv1x1DgradParams&);
template int64_t conv1x1_dgrad_partial_floats<__half>(const Conv1x1DgradParams&);
template int64_t conv1x1_dgrad_partial_floats<__nv_bfloat16>(const Conv1x1DgradParams&);

}  // namespace resnet_fused::cuda
