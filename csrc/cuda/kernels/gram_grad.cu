// Compiles the kernels of gram_grad, see ../launches.h.

#include "gram_grad.cuh"

namespace resnet_fused::cuda {

template void launch_gram_grad<float>(const GramGradParams&, cudaStream_t);
template void launch_gram_grad<__half>(const GramGradParams&, cudaStream_t);
template void launch_gram_grad<__nv_bfloat16>(const GramGradParams&, cudaStream_t);

}  // namespace resnet_fused::cuda
