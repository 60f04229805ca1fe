// The gradient of a dense block's input, grad + b*x + d, from prefixes of the block's buffers: two reads, one write.
#include <torch/csrc/stable/library.h>

#include "../checks/dense_leave.h"
#include "alloc.h"
#include "rows.h"

namespace resnet_fused::cpu {
namespace {

struct Prefix {
  const float* first;
  int64_t pitch;
};

RESNET_FUSED_CLONES void leave(float* __restrict out, const Prefix& grad, const Prefix& x, const float* __restrict b,
                               const float* __restrict d, int64_t begin, int64_t end, int64_t C) {
  for (int64_t m = begin; m < end; ++m) {
    const float *grads = grad.first + m * grad.pitch, *values = x.first + m * x.pitch;
    for (int64_t c = 0; c < C; ++c) {
      const float term = values[c] * b[c];
      out[m * C + c] = grads[c] + ((b[c] == 0 ? 0 : term) + d[c]);  // a frozen norm hands on no NaN
    }
  }
}

Tensor dense_leave(const Tensor& grad, const Tensor& x, const Tensor& b, const Tensor& d) {
  check_dense_leave(grad, x, b, d);
  Tensor grad_x = empty_channels_last(grad);
  const Shape shape(grad);
  const Prefix of_grad{data<float>(grad), pixel_pitch(grad)}, of_x{data<float>(x), pixel_pitch(x)};
  parallel_rows(shape, [&](int64_t begin, int64_t end) {
    leave(data<float>(grad_x), of_grad, of_x, data<float>(b), data<float>(d), begin, end, shape.channels);
  });
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { m.impl("dense_leave", TORCH_BOX(&dense_leave)); }

}  // namespace resnet_fused::cpu
