// Compiles the kernels of gram_norm, see ../launches.h.

#include "gram_norm.cuh"

namespace resnet_fused::cuda {

template void launch_gram_norm<float>(const GramNormParams&, cudaStream_t);
template void launch_gram_norm<__half>(const GramNormParams&, cudaStream_t);
template void launch_gram_norm<__nv_bfloat16>(const GramNormParams&, cudaStream_t);

}  // namespace resnet_fused::cuda
