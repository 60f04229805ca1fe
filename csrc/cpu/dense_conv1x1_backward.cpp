// Both gradients of a dense layer's 1x1 convolution in one pass, the input's times its scale added to what has gathered
// at the prefix that it read.
// Bytes: g, z, x, what is added to and out once; FLOPs 2*M*K*C for each gradient.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "../checks/dense_conv1x1_backward.h"
#include "conv1x1_gradients.h"

namespace resnet_fused::cpu {
namespace {

bool is_zero(float value) { return value == 0; }

std::tuple<Tensor, Tensor, Tensor> dense_conv1x1_backward(const Tensor& out, const OptionalTensor& grad,
                                                          const Tensor& g, const Tensor& z, const Tensor& a,
                                                          const Tensor& b, const Tensor& d, const Tensor& x,
                                                          const Tensor& weight, const Tensor& scale,
                                                          const Tensor& shift, const Tensor& mean) {
  check_dense_conv1x1_backward(out, grad, {g, z, a, b, d}, {x, weight, scale, shift, mean});
  const int64_t K = g.size(1), C = x.size(1);
  Tensor sum_g = empty_stats(x), sum_gx = empty_stats(x);
  Tensor grad_weight = empty_strided<4>(
      {K, C, 1, 1}, {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)}, ScalarType::Float);
  const Tensor& added = grad ? *grad : out;
  Conv1x1Backward p{};
  p.gradient.g = data<float>(g), p.gradient.z = data<float>(z), p.gradient.K = K;
  p.gradient.a = data<float>(a);
  const auto zeros = [K](const Tensor& v) { return std::all_of(data<float>(v), data<float>(v) + K, is_zero); };
  if (!zeros(b) || !zeros(d)) p.gradient.b = data<float>(b), p.gradient.d = data<float>(d);  // else z is not read
  p.gradient.rows_per_sample = g.size(2) * g.size(3);
  const Pixels pixels(x, {1, 1});
  p.input = {data<float>(x), data<float>(scale), data<float>(shift), C, pixels, pixel_pitch(x) - C};
  p.weight = data<float>(weight), p.mean = data<float>(mean);
  p.added = {data<float>(added), nullptr, x.size(2), x.size(3), 1, 1, pixel_pitch(added) - C};
  p.grad_x = data<float>(out), p.gap = pixel_pitch(out) - C, p.through = p.weight_grad = true;
  p.rows = pixels.rows, p.K = K, p.C = C;
  p.most_sums = int64_t(1) << 19;  // few outputs: copies of their gradient cost more than another read of dz
  run_backward(p, {data<float>(grad_weight), data<float>(sum_g), data<float>(sum_gx), nullptr});
  return {sum_g, sum_gx, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("dense_conv1x1_backward", TORCH_BOX(&dense_conv1x1_backward));
}

}  // namespace resnet_fused::cpu
