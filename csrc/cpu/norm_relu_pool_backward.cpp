// Sums of the pooled gradient for batch norm's backward: one read of grad_out, index and z, nothing written.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "../checks/norm_relu_pool_backward.h"
#include "alloc.h"
#include "pool_sums.h"

namespace resnet_fused::cpu {
namespace {

std::tuple<Tensor, Tensor> norm_relu_pool_backward(const Tensor& grad_out, const Tensor& index, const Tensor& z,
                                                   const Tensor& mean, const Tensor& scale, const Tensor& shift,
                                                   const std::vector<int64_t>& kernel,
                                                   const std::vector<int64_t>& stride,
                                                   const std::vector<int64_t>& padding) {
  check_norm_relu_pool_backward(grad_out, index, z, mean, scale, shift, kernel, stride, padding);
  const Tensor sum_g = empty_stats(z), sum_gz = empty_stats(z);
  const PoolShape shape(z, kernel, stride, padding);
  for_element_type(z.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using A = acc_t<T>;
    const PoolSums<A> v{data<A>(mean), data<A>(scale), data<A>(shift)};
    sum_gradient<T>(z, z.size(1), v, sum_g, sum_gz, [&] { return PoolGather<T>(shape, grad_out, index, z); });
  });
  return {sum_g, sum_gz};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("norm_relu_pool_backward", TORCH_BOX(&norm_relu_pool_backward));
}

}  // namespace resnet_fused::cpu
