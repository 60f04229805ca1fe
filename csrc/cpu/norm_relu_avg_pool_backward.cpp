// Sums of the gradient under averages for batch norm's backward: one read of grad_out and x, nothing written.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "../checks/norm_relu_avg_pool_backward.h"
#include "alloc.h"
#include "average_pool.h"
#include "pool_sums.h"

namespace resnet_fused::cpu {
namespace {

std::tuple<Tensor, Tensor> norm_relu_avg_pool_backward(const Tensor& grad_out, const Tensor& x, const Tensor& mean,
                                                       const Tensor& scale, const Tensor& shift,
                                                       const std::vector<int64_t>& kernel,
                                                       const std::vector<int64_t>& stride) {
  check_norm_relu_avg_pool_backward(grad_out, x, mean, scale, shift, kernel, stride);
  const Tensor sum_g = empty_stats(x), sum_gz = empty_stats(x);
  const PoolShape shape = averaged_shape(x, kernel, stride);
  for_element_type(x.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using A = acc_t<T>;
    const PoolSums<A> v{data<A>(mean), data<A>(scale), data<A>(shift)};
    sum_gradient<T>(x, pixel_pitch(x), v, sum_g, sum_gz, [&] { return AverageGather<T>(shape, grad_out, x); });
  });
  return {sum_g, sum_gz};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("norm_relu_avg_pool_backward", TORCH_BOX(&norm_relu_avg_pool_backward));
}

}  // namespace resnet_fused::cpu
