// lazy_grad_apply and lazy_grad_apply_ for CUDA tensors; the meaning is in resnet_fused/ops/lazy_grad_apply.py, the
// kernel in kernels/.

#include "../checks/lazy_grad_apply.h"
#include "common.h"

namespace resnet_fused::cuda {
namespace {

struct Arguments {
  const Tensor& g;
  const OptionalTensor &z, &a, &b, &d, &scale, &shift, &sample_factor, &residual, &mask;

  void check() const { check_lazy_grad_apply(g, z, a, b, d, scale, shift, sample_factor, residual, mask); }
};

void compute(const char* op, const Tensor& dz, const Arguments& t) {
  const LazyGradApplyParams params{extent_of(t.g),
                                   t.g.numel() ? t.g.const_data_ptr() : nullptr,
                                   t.b || t.scale ? pointer<void>(t.z) : nullptr,
                                   pointer<float>(t.a),
                                   pointer<float>(t.b),
                                   pointer<float>(t.d),
                                   pointer<float>(t.scale),
                                   pointer<float>(t.shift),
                                   pointer<float>(t.sample_factor),
                                   pointer<void>(t.residual),
                                   pointer<uint8_t>(t.mask),
                                   output<void>(dz)};
  const cudaStream_t stream = current_stream(t.g);
  launch_as(op, t.g, [&](auto type) { launch_lazy_grad_apply<decltype(type)>(params, stream); });
}

Tensor lazy_grad_apply(const Tensor& g, const OptionalTensor& z, const OptionalTensor& a, const OptionalTensor& b,
                       const OptionalTensor& d, const OptionalTensor& scale, const OptionalTensor& shift,
                       const OptionalTensor& sample_factor, const OptionalTensor& residual,
                       const OptionalTensor& mask) {
  const Arguments t{g, z, a, b, d, scale, shift, sample_factor, residual, mask};
  t.check();
  const DeviceGuard guard(g.get_device_index());
  Tensor dz = empty_channels_last(g);
  compute("lazy_grad_apply", dz, t);
  return dz;
}

void lazy_grad_apply_(const Tensor& g, const OptionalTensor& z, const OptionalTensor& a, const OptionalTensor& b,
                      const OptionalTensor& d, const OptionalTensor& scale, const OptionalTensor& shift,
                      const OptionalTensor& sample_factor, const OptionalTensor& residual, const OptionalTensor& mask) {
  const Arguments t{g, z, a, b, d, scale, shift, sample_factor, residual, mask};
  t.check();
  check_lazy_grad_apply_in_place(g, residual);
  const DeviceGuard guard(g.get_device_index());
  compute("lazy_grad_apply_", g, t);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, m) {
  m.impl("lazy_grad_apply", TORCH_BOX(&lazy_grad_apply));
  m.impl("lazy_grad_apply_", TORCH_BOX(&lazy_grad_apply_));
}

}  // namespace resnet_fused::cuda
