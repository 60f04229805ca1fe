// Gradient at the raw output under a batch norm, ReLU and max pooling, a * g + b * z + d: one read of grad_out, index
// and z, one write of dz.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "../checks/norm_relu_pool_apply.h"
#include "alloc.h"
#include "pool_apply.h"
#include "rows.h"

namespace resnet_fused::cpu {
namespace {

template <class T, bool affine>
void run(const PoolShape& shape, const Tensor& grad_out, const Tensor& index, const Tensor& z,
         const PoolVectors<acc_t<T>>& v, const Tensor& dz) {
  const int64_t C = shape.channels;
  parallel_rows(Shape(z), [&](int64_t begin, int64_t end) {
    PoolGather<T> gather(shape, grad_out, index, z);
    gather.for_each_piece(begin, end, [&](const acc_t<T>* g, const T* piece, int64_t row, int64_t stop) {
      apply<T, affine>(data<T>(dz) + row * C, g, piece, C, v, stop - row, C);
    });
  });
}

Tensor norm_relu_pool_apply(const Tensor& grad_out, const Tensor& index, const Tensor& z, const Tensor& a,
                            const std::optional<Tensor>& b, const std::optional<Tensor>& d, const Tensor& scale,
                            const Tensor& shift, const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                            const std::vector<int64_t>& padding) {
  check_norm_relu_pool_apply("norm_relu_pool_apply", grad_out, index, z, a, b, d, scale, shift, kernel, stride,
                             padding);
  const Tensor dz = empty_channels_last(z);
  const PoolShape shape(z, kernel, stride, padding);
  for_element_type(z.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using A = acc_t<T>;
    const PoolVectors<A> v{data<A>(a), data<A>(b), data<A>(d), data<A>(scale), data<A>(shift)};
    b ? run<T, true>(shape, grad_out, index, z, v, dz) : run<T, false>(shape, grad_out, index, z, v, dz);
  });
  return dz;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { m.impl("norm_relu_pool_apply", TORCH_BOX(&norm_relu_pool_apply)); }

}  // namespace resnet_fused::cpu
