// Compiles the kernels of conv1x1, see ../launches.h.

#include "conv1x1.cuh"

namespace resnet_fused::cuda {

template void launch_conv1x1<float>(const Conv1x1Params&, cudaStream_t);
template void launch_conv1x1<__half>(const Conv1x1Params&, cudaStream_t);
template void launch_conv1x1<__nv_bfloat16>(const Conv1x1Params&, cudaStream_t);
template int64_t conv1x1_partial_floats<float>(const Conv1x1Params&);
template int64_t conv1x1_partial_floats<__half>(const Conv1x1Params&);
template int64_t conv1x1_partial_floats<__nv_bfloat16>(const Conv1x1Params&);

}  // namespace resnet_fused::cuda
