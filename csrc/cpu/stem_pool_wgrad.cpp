// The gradient of a stem's weight from the one at its pool's output: between them nothing is written.
//
// The gradient at the convolution's output is made row by row, by each thread in its cache.
// Bytes: grad_out, index, z and x once.
#include "../checks/stem_pool_wgrad.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "pool_apply.h"
#include "stem_wgrad.h"

namespace resnet_fused::cpu {
namespace {

// Makes the gradient of a row of the convolution's outputs.
class Row {
  const int64_t width, channels;
  const PoolVectors<float> v;
  PoolGather<float> gather;
  AlignedArray<float> made;

 public:
  Row(const PoolShape& shape, const Tensor& grad_out, const Tensor& index, const Tensor& z,
      const PoolVectors<float>& vectors)
      : width(shape.w.size),
        channels(shape.channels),
        v(vectors),
        gather(shape, grad_out, index, z),
        made(aligned_array<float>(width * channels)) {}

  const float* operator()(int64_t row) {
    gather.for_each_piece(row * width, (row + 1) * width,
                          [&](const float* g, const float* z, int64_t begin, int64_t end) {
                            float* dz = made.get() + (begin - row * width) * channels;
                            v.b ? apply<float, true>(dz, g, z, channels, v, end - begin, channels)
                                : apply<float, false>(dz, g, z, channels, v, end - begin, channels);
                          });
    return made.get();
  }
};

Tensor stem_pool_wgrad(const Tensor& grad_out, const Tensor& index, const Tensor& z, const Tensor& a,
                       const OptionalTensor& b, const OptionalTensor& d, const Tensor& scale, const Tensor& shift,
                       const Tensor& x, const Tensor& weight, const std::vector<int64_t>& stride,
                       const std::vector<int64_t>& padding, const std::vector<int64_t>& pool_kernel,
                       const std::vector<int64_t>& pool_stride, const std::vector<int64_t>& pool_padding) {
  check_stem_pool_wgrad(grad_out, index, z, a, b, d, scale, shift, x, weight, stride, padding, pool_kernel, pool_stride,
                        pool_padding);
  Stem p(x, weight, stride, padding);
  Tensor out = empty_like_weight(weight);
  if (out.numel() == 0) return out;
  if (z.numel() == 0) return torch::stable::zero_(out);
  const PoolShape shape(z, pool_kernel, pool_stride, pool_padding);
  const PoolVectors<float> v{data<float>(a), data<float>(b), data<float>(d), data<float>(scale), data<float>(shift)};
  const auto make = [&] { return Row(shape, grad_out, index, z, v); };
  if (!stem_gradient(p, out, make)) {
    const Tensor grad = empty_channels_last(z);
    Row row_of = make();
    for (int64_t row = 0; row < p.N * p.P; ++row) {
      std::copy_n(row_of(row), p.Q * p.K, data<float>(grad) + row * p.Q * p.K);
    }
    stem_gradient_by_aten(grad, x, weight, stride, padding, out);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { m.impl("stem_pool_wgrad", TORCH_BOX(&stem_pool_wgrad)); }

}  // namespace resnet_fused::cpu
