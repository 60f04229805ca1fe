// The first convolution of a dense layer: as conv1x1, of a prefix of each pixel of the block's buffer.
// Bytes: the prefix, weight and z once; FLOPs 2*M*K*C.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../checks/dense_conv1x1.h"
#include "alloc.h"
#include "conv1x1_forward.h"
#include "rows.h"

namespace resnet_fused::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor> dense_conv1x1(const Tensor& x, const Tensor& weight, const Tensor& scale,
                                                 const Tensor& shift, bool statistics) {
  check_dense_conv1x1(x, weight, scale, shift);
  const int64_t K = weight.size(0), C = x.size(1);
  Tensor z = empty_images(x.size(0), K, x.size(2), x.size(3), ScalarType::Float);
  Tensor mean = empty_stats(z, statistics), m2 = empty_stats(z, statistics);
  Conv1x1 p{};
  const Pixels pixels(x, {1, 1});
  p.input = {data<float>(x), data<float>(scale), data<float>(shift), C, pixels, pixel_pitch(x) - C};
  p.weight = data<float>(weight), p.z = data<float>(z);
  p.rows = pixels.rows, p.C = C, p.K = K;
  run_forward(p, mean, m2);
  return {z, mean, m2};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { m.impl("dense_conv1x1", TORCH_BOX(&dense_conv1x1)); }

}  // namespace resnet_fused::cpu
