// Compiles the kernels of gram, see ../launches.h.

#include "gram.cuh"

namespace resnet_fused::cuda {

template void launch_gram<float>(const GramParams&, cudaStream_t);
template void launch_gram<__half>(const GramParams&, cudaStream_t);
template void launch_gram<__nv_bfloat16>(const GramParams&, cudaStream_t);
template int64_t gram_partial_floats<float>(const GramParams&);
template int64_t gram_partial_floats<__half>(const GramParams&);
template int64_t gram_partial_floats<__nv_bfloat16>(const GramParams&);

}  // namespace resnet_fused::cuda
