// Compiles the kernels of bn_stats, see ../launches.h.

#include "bn_stats.cuh"

namespace resnet_fused::cuda {

template void launch_bn_stats<float>(const BnStatsParams&, cudaStream_t);
template void launch_bn_stats<__half>(const BnStatsParams&, cudaStream_t);
template void launch_bn_stats<__nv_bfloat16>(const BnStatsParams&, cudaStream_t);

}  // namespace resnet_fused::cuda
