// conv1x1_dgrad for CUDA tensors; the meaning is in resnet_fused/ops/conv1x1_dgrad.py, the kernel in kernels/.

#include "../checks/conv1x1_dgrad.h"
#include "conv1x1_gradients.h"

namespace resnet_fused::cuda {
namespace {

using DgradResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// What there is room for beside grad_x: empty where it is not asked for.
struct Found {
  Tensor sum_g, sum_gx, b, d, grad_gamma;

  Found(const Tensor& g, int64_t channels, bool sums, bool coefficients) {
    const auto vector = [&](bool there) { return empty_like(g, {there ? channels : 0}, ScalarType::Float); };
    sum_g = vector(sums), sum_gx = vector(sums && !coefficients);
    b = vector(coefficients), d = vector(coefficients), grad_gamma = vector(coefficients);
  }
};

DgradResults conv1x1_dgrad(const Tensor& g, const OptionalTensor& weight, const OptionalTensor& mask,
                           const OptionalTensor& z, const OptionalTensor& a, const OptionalTensor& b,
                           const OptionalTensor& d, const OptionalTensor& scale, const OptionalTensor& shift,
                           const OptionalTensor& sample_factor, const OptionalTensor& x, const OptionalTensor& x_scale,
                           const OptionalTensor& x_shift, const OptionalTensor& x_mean, const OptionalTensor& coupling,
                           const OptionalTensor& constant, const OptionalTensor& residual,
                           const OptionalTensor& residual_mask, std::vector<int64_t> residual_stride,
                           std::vector<int64_t> x_stride, const OptionalTensor& x_rstd, bool weight_grad) {
  const char* op = "conv1x1_dgrad";
  check_gradient(op, g, mask, z, a, b, d, scale, shift, sample_factor, true);
  check_conv1x1_dgrad(g, weight, {x, x_scale, x_shift, x_mean, x_rstd, x_stride},
                      {coupling, constant, residual, residual_mask, residual_stride}, weight_grad, true);
  const int64_t N = g.size(0), K = g.size(1), C = weight ? weight->size(1) : K;
  check_sizes(op, g, x, K, C);
  const DeviceGuard guard(g.get_device_index());
  Tensor grad_x =
      empty_like(g, {N, C, g.size(2), g.size(3)}, g.scalar_type(), torch::headeronly::MemoryFormat::ChannelsLast);
  Tensor grad_weight = weight_grad ? empty_like(g, {K, C}, g.scalar_type()) : empty_like(g, {0}, g.scalar_type());
  const bool sums = x_scale.has_value(), coefficients = x_rstd.has_value();
  const Found found(g, C, sums, coefficients);
  const int64_t pixels = x ? x->size(0) * x->size(2) * x->size(3) : 0;  // of the batch norm, read here or not
  Conv1x1DgradParams params{
      gradient_of(g, mask, z, a, b, d, scale, shift, sample_factor),
      input_of(g, x, C, x_scale, x_shift, x_stride),
      pointer<void>(weight),
      pointer<void>(coupling),
      pointer<float>(constant),
      pointer<float>(x_mean),
      pointer<void>(residual),
      pointer<uint8_t>(residual_mask),
      static_cast<int>(residual_stride[0]),
      static_cast<int>(residual_stride[1]),
      output<void>(grad_x),
      {},
      nullptr,
      {output<float>(found.sum_g),
       output<float>(found.sum_gx),
       {pixels, C, nullptr, nullptr, pointer<float>(x_mean), pointer<float>(x_rstd), pointer<float>(x_scale),
        output<float>(found.b), output<float>(found.d), output<float>(found.grad_gamma)}}};
  const cudaStream_t stream = current_stream(g);
  WgradSums of_weight{empty_like(g, {0}, ScalarType::Float), 0};
  if (weight_grad) {
    of_weight = start_wgrad(op, g, {params.gradient, params.input, nullptr, nullptr, nullptr, true}, stream);
    if (of_weight.splits == 0) torch::stable::zero_(grad_weight);
    const int size = static_cast<int>(K * C), stride = static_cast<int>(K * C + K);
    params.weight_grad = {output<float>(of_weight.partial), of_weight.splits, stride, size, output<void>(grad_weight)};
  }
  Tensor scratch = empty_like(g, {0}, ScalarType::Float);
  launch_as(op, g, [&](auto t) {
    using T = decltype(t);
    if (sums) scratch = empty_like(g, {conv1x1_dgrad_partial_floats<T>(params)}, ScalarType::Float);
    params.partial = output<float>(scratch);
    launch_conv1x1_dgrad<T>(params, stream);
  });
  return {grad_x, found.sum_g, found.sum_gx, found.b, found.d, found.grad_gamma, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, m) { m.impl("conv1x1_dgrad", TORCH_BOX(&conv1x1_dgrad)); }

}  // namespace resnet_fused::cuda
