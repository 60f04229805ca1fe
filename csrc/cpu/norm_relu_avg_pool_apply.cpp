// Gradient at what was normalised, clamped and averaged, a * g + b * x + d: one read of grad_out and x, one write.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "../checks/norm_relu_avg_pool_apply.h"
#include "alloc.h"
#include "average_pool.h"
#include "pool_apply.h"

namespace resnet_fused::cpu {
namespace {

template <class T, bool affine>
void run(const PoolShape& shape, const Tensor& grad_out, const Tensor& x, const PoolVectors<acc_t<T>>& v,
         const Tensor& grad_x) {
  const int64_t C = shape.channels, pitch = pixel_pitch(x);
  parallel_rows(Shape(x), [&](int64_t begin, int64_t end) {
    AverageGather<T> gather(shape, grad_out, x);
    gather.for_each_piece(begin, end, [&](const acc_t<T>* g, const T* piece, int64_t row, int64_t stop) {
      apply<T, affine>(data<T>(grad_x) + row * C, g, piece, pitch, v, stop - row, C);
    });
  });
}

Tensor norm_relu_avg_pool_apply(const Tensor& grad_out, const Tensor& x, const Tensor& a, const OptionalTensor& b,
                                const OptionalTensor& d, const Tensor& scale, const Tensor& shift,
                                const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride) {
  check_norm_relu_avg_pool_apply(grad_out, x, a, b, d, scale, shift, kernel, stride);
  const Tensor grad_x = empty_channels_last(x);
  const PoolShape shape = averaged_shape(x, kernel, stride);
  for_element_type(x.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using A = acc_t<T>;
    const PoolVectors<A> v{data<A>(a), data<A>(b), data<A>(d), data<A>(scale), data<A>(shift)};
    b ? run<T, true>(shape, grad_out, x, v, grad_x) : run<T, false>(shape, grad_out, x, v, grad_x);
  });
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("norm_relu_avg_pool_apply", TORCH_BOX(&norm_relu_avg_pool_apply));
}

}  // namespace resnet_fused::cpu
