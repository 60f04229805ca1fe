// The schemas of the compiled ops, in one place (word for word those of resnet_fused/ops/<op>.py), and the Python
// module `_C`. Importing the module registers the schemas and, through csrc/cpu/<op>.cpp, the CPU kernels.

#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include "build_info.h"
#include "cpu_levels.h"

STABLE_TORCH_LIBRARY(resnet_fused, m) {
  m.def(
      "bn_stats(Tensor z, Tensor? gamma=None, Tensor? beta=None, float? eps=None) "
      "-> (Tensor mean, Tensor m2, Tensor var, Tensor rstd, Tensor scale, Tensor shift, Tensor centre)");
  m.def("add_stats_(Tensor(a!) out, Tensor other, Tensor? sample_factor=None) -> (Tensor mean, Tensor m2)");
  m.def(
      "bn_affine(Tensor mean, Tensor m2, Tensor? gamma, Tensor? beta, Tensor z, float eps) "
      "-> (Tensor var, Tensor rstd, Tensor scale, Tensor shift, Tensor centre)");
  m.def(
      "bn_coefficients(Tensor sum_g, Tensor sum_gz, Tensor mean, Tensor rstd, Tensor scale, Tensor z) "
      "-> (Tensor b, Tensor d, Tensor grad_gamma)");
  m.def(
      "norm_add_relu(Tensor z, Tensor scale, Tensor shift, Tensor? residual=None, Tensor? residual_scale=None, "
      "Tensor? residual_shift=None, Tensor? sample_factor=None, bool relu=True, bool emit_mask=False) "
      "-> (Tensor out, Tensor mask)");
  m.def(
      "norm_add_relu_backward(Tensor grad_out, Tensor? z=None, Tensor? mean=None, Tensor? scale=None, "
      "Tensor? shift=None, Tensor? mask=None, Tensor? residual=None, Tensor? residual_mean=None, "
      "Tensor? sample_factor=None, bool relu=True, bool emit_grad=True) "
      "-> (Tensor g, Tensor sum_g, Tensor sum_gz, Tensor residual_sum_g, Tensor residual_sum_gz)");
  m.def("norm_act(Tensor z, Tensor scale, Tensor shift, int act, float slope=0.) -> Tensor out");
  m.def(
      "norm_act_backward(Tensor grad_out, Tensor z, Tensor mean, Tensor scale, Tensor shift, int act, float slope=0.) "
      "-> (Tensor sum_g, Tensor sum_gz)");
  m.def(
      "norm_act_apply(Tensor g, Tensor z, Tensor a, Tensor? b, Tensor? d, Tensor scale, Tensor shift, int act, "
      "float slope=0.) -> Tensor dz");
  m.def(
      "norm_act_apply_(Tensor(a!) g, Tensor z, Tensor a, Tensor? b, Tensor? d, Tensor scale, Tensor shift, int act, "
      "float slope=0.) -> ()");
  m.def(
      "gate_add_relu(Tensor z, Tensor factor, Tensor? term=None, Tensor? residual=None, bool relu=True) -> Tensor out");
  m.def("gate_add_relu_(Tensor(a!) z, Tensor factor, Tensor? term=None, Tensor? residual=None, bool relu=True) -> ()");
  m.def("gate_add_relu_backward(Tensor grad_out, Tensor z, Tensor? out=None) -> (Tensor g, Tensor sum_gz)");
  m.def(
      "lazy_grad_apply(Tensor g, Tensor? z, Tensor? a, Tensor? b=None, Tensor? d=None, Tensor? scale=None, "
      "Tensor? shift=None, Tensor? sample_factor=None, Tensor? residual=None, Tensor? mask=None) -> Tensor dz");
  m.def(
      "lazy_grad_apply_(Tensor(a!) g, Tensor? z, Tensor? a, Tensor? b=None, Tensor? d=None, Tensor? scale=None, "
      "Tensor? shift=None, Tensor? sample_factor=None, Tensor? residual=None, Tensor? mask=None) -> ()");
  m.def(
      "conv_weight_grad(Tensor grad, Tensor x, Tensor weight, int[2] stride=1, int[2] padding=0, "
      "int[2] dilation=1) -> Tensor grad_w");
  m.def(
      "winograd_conv3x3(Tensor x, Tensor weight, int padding=1, bool transposed=False, bool statistics=False, "
      "int outputs=2) "
      "-> (Tensor z, Tensor mean, Tensor m2)");
  m.def(
      "winograd_conv3x3_wgrad(Tensor grad, Tensor x, Tensor weight, int[2] padding=1) "
      "-> Tensor grad_w");
  m.def(
      "grouped_conv3x3(Tensor x, Tensor weight, int stride=1, bool transposed=False, bool statistics=False, "
      "int[2] output_padding=0) -> (Tensor z, Tensor mean, Tensor m2)");
  m.def("grouped_conv3x3_wgrad(Tensor grad, Tensor x, Tensor weight, int stride=1) -> Tensor grad_w");
  m.def("winograd_weight3x3(Tensor weight, Tensor? scale=None, int outputs=2, int stride=1) -> Tensor packed");
  m.def(
      "winograd_conv3x3_add_relu(Tensor x, Tensor weight, Tensor packed, Tensor? scale=None, Tensor? shift=None, "
      "Tensor? residual=None, int padding=1, bool relu=False, int stride=1) -> Tensor out");
  m.def(
      "conv_norm_add_relu(Tensor x, Tensor weight, Tensor? bias, Tensor? mean, Tensor? var, Tensor? gamma, "
      "Tensor? beta, float eps, Tensor? residual=None, int[2] stride=1, int[2] padding=0, int[2] dilation=1, "
      "bool relu=False) -> Tensor out");
  m.def(
      "conv_chain(Tensor x, Tensor? residual, Tensor?[] tensors, int[] steps, float[] eps) "
      "-> Tensor out");
  m.def(
      "conv_norm_relu_pool(Tensor x, Tensor weight, Tensor? bias, Tensor? mean, Tensor? var, Tensor? gamma, "
      "Tensor? beta, float eps, int[2] stride=1, int[2] padding=0, int[2] pool_kernel=3, int[2] pool_stride=2, "
      "int[2] pool_padding=1) -> Tensor out");
  m.def(
      "stem_conv(Tensor x, Tensor weight, int[2] stride=1, int[2] padding=0, bool statistics=False) "
      "-> (Tensor z, Tensor mean, Tensor m2)");
  m.def("stem_conv_wgrad(Tensor grad, Tensor x, Tensor weight, int[2] stride=1, int[2] padding=0) -> Tensor grad_w");
  m.def(
      "stem_pool_wgrad(Tensor grad_out, Tensor index, Tensor z, Tensor a, Tensor? b, Tensor? d, Tensor scale, "
      "Tensor shift, Tensor x, Tensor weight, int[2] stride=1, int[2] padding=0, int[2] pool_kernel=3, "
      "int[2] pool_stride=2, int[2] pool_padding=1) -> Tensor grad_w");
  m.def(
      "conv_norm_add_relu_(Tensor(a!) out, Tensor x, Tensor weight, Tensor? bias, Tensor? mean, Tensor? var, "
      "Tensor? gamma, Tensor? beta, float eps, Tensor? residual=None, int[2] stride=1, int[2] padding=0, "
      "int[2] dilation=1, bool relu=False, bool adds=False) -> ()");
  m.def(
      "conv1x1(Tensor x, Tensor weight, Tensor? x_scale=None, Tensor? x_shift=None, int[2] stride=1, "
      "bool emit_stats=True, Tensor? gamma=None, Tensor? beta=None, float? eps=None) "
      "-> (Tensor z, Tensor mean, Tensor m2, Tensor var, Tensor rstd, Tensor scale, Tensor shift, Tensor centre)");
  m.def(
      "conv_values(Tensor x, Tensor weight, Tensor? x_scale=None, Tensor? x_shift=None, int[2] stride=1, "
      "int[2] padding=0, int[2] dilation=1, bool emit_stats=True, Tensor? gamma=None, Tensor? beta=None, "
      "float? eps=None) -> (Tensor z, Tensor mean, Tensor m2, Tensor var, Tensor rstd, Tensor scale, Tensor shift, "
      "Tensor centre)");
  m.def(
      "conv1x1_dgrad(Tensor g, Tensor? weight, Tensor? mask=None, Tensor? z=None, Tensor? a=None, Tensor? b=None, "
      "Tensor? d=None, Tensor? scale=None, Tensor? shift=None, Tensor? sample_factor=None, Tensor? x=None, "
      "Tensor? x_scale=None, Tensor? x_shift=None, Tensor? x_mean=None, Tensor? coupling=None, Tensor? constant=None, "
      "Tensor? residual=None, Tensor? residual_mask=None, int[2] residual_stride=1, int[2] x_stride=1, "
      "Tensor? x_rstd=None, bool weight_grad=False) -> (Tensor grad_x, Tensor sum_g, Tensor sum_gx, Tensor b, "
      "Tensor d, Tensor grad_gamma, Tensor grad_weight)");
  m.def(
      "conv1x1_wgrad(Tensor g, Tensor x, Tensor? mask=None, Tensor? z=None, Tensor? a=None, Tensor? b=None, "
      "Tensor? d=None, Tensor? scale=None, Tensor? shift=None, Tensor? sample_factor=None, Tensor? x_scale=None, "
      "Tensor? x_shift=None, int[2] stride=1, bool rounded=False, Tensor? join_weight=None, Tensor? gram=None, "
      "Tensor? total=None, Tensor? centre=None, Tensor? join_scale=None, Tensor? join_rstd=None) "
      "-> (Tensor grad_weight, Tensor sum_g, Tensor grad_gamma, Tensor coupling, Tensor constant)");
  m.def(
      "conv1x1_join(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? x_scale=None, Tensor? x_shift=None, "
      "Tensor? residual=None, Tensor? residual_scale=None, Tensor? residual_shift=None, Tensor? x2=None, "
      "Tensor? weight2=None, Tensor? scale2=None, Tensor? shift2=None, int[2] stride2=1, "
      "Tensor? sample_factor=None, bool relu=True, bool emit_mask=False) -> (Tensor out, Tensor mask)");
  m.def(
      "conv_join(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual=None, int[2] stride=1, "
      "int[2] padding=0, int[2] dilation=1, Tensor? sample_factor=None, bool relu=True, bool emit_mask=False) "
      "-> (Tensor out, Tensor mask)");
  m.def(
      "gram(Tensor a, Tensor centre, Tensor? scale=None, Tensor? shift=None, int[2] stride=1) "
      "-> (Tensor gram, Tensor total)");
  m.def(
      "gram_norm(Tensor weight, Tensor gram, Tensor total, Tensor centre, Tensor a, Tensor? gamma=None, "
      "Tensor? beta=None, float? eps=None) "
      "-> (Tensor mean, Tensor m2, Tensor var, Tensor rstd, Tensor scale, Tensor shift, Tensor centre)");
  m.def(
      "gram_grad(Tensor weight, Tensor product, Tensor gram, Tensor total, Tensor centre, Tensor sum_g, Tensor "
      "scale, "
      "Tensor rstd, Tensor a) -> (Tensor grad_weight, Tensor grad_gamma, Tensor coupling, Tensor constant)");
  m.def(
      "norm_relu_pool(Tensor z, Tensor scale, Tensor shift, int[2] kernel=3, int[2] stride=2, int[2] padding=1) "
      "-> (Tensor out, Tensor index)");
  m.def(
      "norm_relu_pool_backward(Tensor grad_out, Tensor index, Tensor z, Tensor mean, Tensor scale, Tensor shift, "
      "int[2] kernel=3, int[2] stride=2, int[2] padding=1) -> (Tensor sum_g, Tensor sum_gz)");
  m.def(
      "norm_relu_pool_apply(Tensor grad_out, Tensor index, Tensor z, Tensor a, Tensor? b, Tensor? d, Tensor scale, "
      "Tensor shift, int[2] kernel=3, int[2] stride=2, int[2] padding=1) -> Tensor dz");
  m.def("dense_enter(Tensor x, Tensor(a!) out) -> (Tensor mean, Tensor m2)");
  m.def(
      "dense_conv1x1(Tensor x, Tensor weight, Tensor scale, Tensor shift, bool statistics=True) "
      "-> (Tensor z, Tensor mean, Tensor m2)");
  m.def(
      "dense_conv3x3(Tensor z, Tensor weight, Tensor scale, Tensor shift, Tensor(a!) out, bool statistics=True) "
      "-> (Tensor mean, Tensor m2)");
  m.def(
      "dense_conv3x3_backward(Tensor grad, Tensor y, Tensor b, Tensor d, Tensor z, Tensor weight, Tensor scale, "
      "Tensor shift, Tensor mean) -> (Tensor g, Tensor sum_g, Tensor sum_gz, Tensor grad_weight)");
  m.def(
      "dense_conv1x1_backward(Tensor(a!) out, Tensor? grad, Tensor g, Tensor z, Tensor a, Tensor b, Tensor d, "
      "Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor mean) "
      "-> (Tensor sum_g, Tensor sum_gx, Tensor grad_weight)");
  m.def("dense_leave(Tensor grad, Tensor x, Tensor b, Tensor d) -> Tensor grad_x");
  m.def(
      "norm_relu_avg_pool(Tensor x, Tensor scale, Tensor shift, int[2] kernel=2, int[2] stride=2) "
      "-> Tensor out");
  m.def(
      "norm_relu_avg_pool_backward(Tensor grad_out, Tensor x, Tensor mean, Tensor scale, Tensor shift, "
      "int[2] kernel=2, int[2] stride=2) -> (Tensor sum_g, Tensor sum_gz)");
  m.def(
      "norm_relu_avg_pool_apply(Tensor grad_out, Tensor x, Tensor a, Tensor? b, Tensor? d, Tensor scale, Tensor shift, "
      "int[2] kernel=2, int[2] stride=2) -> Tensor grad_x");
  // Not ops of the contract: see csrc/cpu/<name>.cpp, kept_memory.cpp for the last.
  m.def("checksum(Tensor[] tensors) -> int[]");
  m.def("new_batch(Tensor like, int samples) -> Tensor");
  m.def("empty_cache() -> int");
}

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  for (const auto& [name, value] : resnet_fused::build_facts()) info[name] = value;
  info["cpu_levels"] = resnet_fused::kCpuLevels;
  info["cpu_level"] = resnet_fused::cpu_level();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled ops of resnet_fused; import torch first, then call torch.ops.resnet_fused.<op>.";
  m.def("build_info", &build_info, "How this library was built, and the CPU level that this machine runs.");
}
