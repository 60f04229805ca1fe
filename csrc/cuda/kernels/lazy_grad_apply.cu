// Compiles the kernels of lazy_grad_apply, see ../launches.h.

#include "lazy_grad_apply.cuh"

namespace resnet_fused::cuda {

template void launch_lazy_grad_apply<float>(const LazyGradApplyParams&, cudaStream_t);
template void launch_lazy_grad_apply<__half>(const LazyGradApplyParams&, cudaStream_t);
template void launch_lazy_grad_apply<__nv_bfloat16>(const LazyGradApplyParams&, cudaStream_t);

}  // namespace resnet_fused::cuda
