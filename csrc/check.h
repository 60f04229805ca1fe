// The one place where C++ words an argument error: what came, what is accepted, what to do. CPU and CUDA kernels call
// check_<op>() first and may then trust shapes, dtypes, devices and strides.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace resnet_fused {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A plain runtime_error: Python shows it as RuntimeError, without the source position that STD_TORCH_CHECK prepends.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << ']';
  return text.str();
}

inline const char* device_of(const Tensor& t) { return t.is_cuda() ? "cuda" : t.is_cpu() ? "cpu" : "another device"; }

// Dtype of per-channel vectors for activations of `dtype`.
inline ScalarType stat_dtype(ScalarType dtype) { return dtype == ScalarType::Double ? dtype : ScalarType::Float; }

// Row-major [N*H*W, C]: the stride of a dimension of size 1 says nothing, and an empty tensor has no layout.
inline bool is_channels_last(const Tensor& t) {
  const int64_t expected[4] = {t.size(1) * t.size(2) * t.size(3), 1, t.size(1) * t.size(3), t.size(1)};
  if (t.numel() == 0) return true;
  for (int64_t i = 0; i < 4; ++i) {
    if (t.size(i) != 1 && t.stride(i) != expected[i]) return false;
  }
  return true;
}

inline void check_layout(const char* op, const char* name, const Tensor& t) {
  if (!is_channels_last(t)) {
    fail(op, ": ", name, " of shape ", shape_of(t), " is not channels_last; pass ", name,
         ".contiguous(memory_format=torch.channels_last)");
  }
}

// The tensor that decides dtype, device and shape of all others.
inline void check_data(const char* op, const char* name, const Tensor& t) {
  if (t.dim() != 4) fail(op, ": ", name, " has shape ", shape_of(t), "; pass a [N, C, H, W] tensor");
  const ScalarType dtype = t.scalar_type();
  const bool wide = dtype == ScalarType::Double && t.is_cpu();
  if (!wide && dtype != ScalarType::Float && dtype != ScalarType::BFloat16 && dtype != ScalarType::Half) {
    fail(op, ": ", name, " is ", dtype, "; pass Float, BFloat16 or Half", t.is_cpu() ? ", or Double" : "");
  }
  check_layout(op, name, t);
}

inline void check_device(const char* op, const char* name, const Tensor& t, const Tensor& data) {
  if (t.is_cuda() != data.is_cuda() || t.get_device_index() != data.get_device_index()) {
    fail(op, ": ", name, " is on ", device_of(t), " ", t.get_device_index(), " but the activations are on ",
         device_of(data), " ", data.get_device_index(), "; move it there");
  }
}

inline void check_like(const char* op, const char* name, const Tensor& t, const char* data_name, const Tensor& data) {
  check_device(op, name, t, data);
  if (t.scalar_type() != data.scalar_type()) {
    fail(op, ": ", name, " is ", t.scalar_type(), " but ", data_name, " is ", data.scalar_type(), "; pass one dtype");
  }
  if (shape_of(t) != shape_of(data)) {
    fail(op, ": ", name, " has shape ", shape_of(t), " but ", data_name, " has ", shape_of(data),
         "; pass tensors of one shape");
  }
  check_layout(op, name, t);
}

// A contiguous vector along dimension `dim` of the activations: [C] for dim 1, [N] for dim 0.
inline void check_vector(const char* op, const char* name, const Tensor& t, const Tensor& data, int64_t dim = 1) {
  check_device(op, name, t, data);
  if (t.dim() != 1 || t.size(0) != data.size(dim)) {
    fail(op, ": ", name, " has shape ", shape_of(t), " but the activations have ", data.size(dim),
         dim == 1 ? " channels" : " samples", "; pass a [", data.size(dim), "] vector");
  }
  if (t.scalar_type() != stat_dtype(data.scalar_type())) {
    fail(op, ": ", name, " is ", t.scalar_type(), "; pass ", stat_dtype(data.scalar_type()), " for ",
         data.scalar_type(), " activations");
  }
  if (!t.is_contiguous()) fail(op, ": ", name, " is not contiguous; pass ", name, ".contiguous()");
}

using NamedVector = std::pair<const char*, const Tensor*>;  // null: absent

// Contiguous vectors on a few channels, without activations beside them; `first` decides dtype, device and length.
inline void check_vectors(const char* op, const Tensor& first, const std::vector<NamedVector>& others) {
  const ScalarType dtype = first.scalar_type();
  if (first.dim() != 1 || !first.is_contiguous() || (dtype != ScalarType::Float && dtype != ScalarType::Double)) {
    fail(op, ": the first vector is ", dtype, " of shape ", shape_of(first), "; pass a contiguous [C] Float or Double");
  }
  for (const auto& [name, t] : others) {
    if (!t) continue;
    check_device(op, name, *t, first);
    if (t->dim() != 1 || t->size(0) != first.size(0) || t->scalar_type() != dtype || !t->is_contiguous()) {
      fail(op, ": ", name, " is ", t->scalar_type(), " of shape ", shape_of(*t), "; pass a contiguous [", first.size(0),
           "] ", dtype, " vector");
    }
  }
}

// Two vectors that make sense only together.
inline void check_pair(const char* op, const char* name, const OptionalTensor& t, const char* other_name,
                       const OptionalTensor& other, const Tensor& data) {
  if (t.has_value() != other.has_value()) {
    fail(op, ": got ", t ? name : other_name, " without ", t ? other_name : name, "; pass both or neither");
  }
  if (t) check_vector(op, name, *t, data);
  if (other) check_vector(op, other_name, *other, data);
}

// A tensor and the vector that is subtracted from it in its sum.
inline void check_centred(const char* op, const char* name, const OptionalTensor& t, const char* mean_name,
                          const OptionalTensor& mean, const Tensor& data) {
  if (t) check_like(op, name, *t, "grad_out", data);
  if (t.has_value() != mean.has_value()) {
    fail(op, ": got ", t ? name : mean_name, " without ", t ? mean_name : name, "; pass both or neither");
  }
  if (mean) check_vector(op, mean_name, *mean, data);
}

inline void check_factor(const char* op, const OptionalTensor& factor, const Tensor& data) {
  if (factor) check_vector(op, "sample_factor", *factor, data, 0);
}

inline void check_bn_stats(const Tensor& z) { check_data("bn_stats", "z", z); }

inline void check_norm_add_relu(const Tensor& z, const Tensor& scale, const Tensor& shift,
                                const OptionalTensor& residual, const OptionalTensor& residual_scale,
                                const OptionalTensor& residual_shift, const OptionalTensor& sample_factor) {
  const char* op = "norm_add_relu";
  check_data(op, "z", z);
  check_vector(op, "scale", scale, z);
  check_vector(op, "shift", shift, z);
  if (residual) check_like(op, "residual", *residual, "z", z);
  if (residual_scale && !residual) fail(op, ": got residual_scale without residual; pass both");
  check_pair(op, "residual_scale", residual_scale, "residual_shift", residual_shift, z);
  check_factor(op, sample_factor, z);
}

inline void check_mask(const char* op, const Tensor& mask, const Tensor& data) {
  if (mask.scalar_type() != ScalarType::Byte) return check_like(op, "mask", mask, "grad_out", data);
  check_device(op, "mask", mask, data);
  const int64_t rows = data.size(0) * data.size(2) * data.size(3), bytes = (data.size(1) + 7) / 8;
  if (mask.dim() != 2 || mask.size(0) != rows || mask.size(1) != bytes || !mask.is_contiguous()) {
    fail(op, ": mask has shape ", shape_of(mask), "; pass the contiguous [", rows, ", ", bytes,
         "] mask that norm_add_relu emitted for activations of shape ", shape_of(data));
  }
}

inline void check_norm_add_relu_backward(const Tensor& grad_out, const OptionalTensor& z, const OptionalTensor& mean,
                                         const OptionalTensor& scale, const OptionalTensor& shift,
                                         const OptionalTensor& mask, const OptionalTensor& residual,
                                         const OptionalTensor& residual_mean, const OptionalTensor& sample_factor,
                                         bool relu) {
  const char* op = "norm_add_relu_backward";
  check_data(op, "grad_out", grad_out);
  check_centred(op, "z", z, "mean", mean, grad_out);
  check_pair(op, "scale", scale, "shift", shift, grad_out);
  if (mask) check_mask(op, *mask, grad_out);
  if (relu && !mask && !(z && scale)) fail(op, ": with relu, pass mask, or z, scale and shift to recompute it from");
  check_centred(op, "residual", residual, "residual_mean", residual_mean, grad_out);
  check_factor(op, sample_factor, grad_out);
}

inline void check_lazy_grad_apply(const Tensor& g, const OptionalTensor& z, const Tensor& a, const OptionalTensor& b,
                                  const OptionalTensor& d, const OptionalTensor& scale, const OptionalTensor& shift,
                                  const OptionalTensor& sample_factor) {
  const char* op = "lazy_grad_apply";
  check_data(op, "g", g);
  if (z) check_like(op, "z", *z, "g", g);
  check_vector(op, "a", a, g);
  check_pair(op, "b", b, "d", d, g);
  check_pair(op, "scale", scale, "shift", shift, g);
  if (!z && (b || scale)) fail(op, ": got ", b ? "b" : "scale", " without z; pass z too");
  check_factor(op, sample_factor, g);
}

inline void check_conv_weight_grad(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                   const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                   const std::vector<int64_t>& dilation) {
  const char* op = "conv_weight_grad";
  check_data(op, "grad", grad);
  check_data(op, "x", x);
  check_device(op, "x", x, grad);
  if (x.scalar_type() != grad.scalar_type() || weight.scalar_type() != grad.scalar_type()) {
    fail(op, ": got ", grad.scalar_type(), " grad, ", x.scalar_type(), " x and ", weight.scalar_type(),
         " weight; pass one dtype");
  }
  if (stride.size() != 2 || padding.size() != 2 || dilation.size() != 2) {
    fail(op, ": stride, padding and dilation have ", stride.size(), ", ", padding.size(), " and ", dilation.size(),
         " entries; pass two of each");
  }
  bool fits =
      weight.dim() == 4 && weight.size(0) == grad.size(1) && weight.size(1) == x.size(1) && grad.size(0) == x.size(0);
  for (int64_t i = 0; fits && i < 2; ++i) {
    const int64_t reach = dilation[i] * (weight.size(2 + i) - 1) + 1;
    fits = stride[i] > 0 && grad.size(2 + i) == (x.size(2 + i) + 2 * padding[i] - reach) / stride[i] + 1;
  }
  if (!fits) {
    fail(op, ": a convolution of x ", shape_of(x), " with weight ", shape_of(weight), " does not give ", shape_of(grad),
         "; pass the gradient at its output, and a weight without groups");
  }
}

inline void check_gram(const Tensor& a, const Tensor& centre, const OptionalTensor& scale, const OptionalTensor& shift,
                       const std::vector<int64_t>& stride) {
  check_data("gram", "a", a);
  check_vector("gram", "centre", centre, a);
  check_pair("gram", "scale", scale, "shift", shift, a);
  if (stride.size() != 2) fail("gram: stride has ", stride.size(), " entries; pass two");
  if (stride[0] < 1 || stride[1] < 1) {
    fail("gram: stride is [", stride[0], ", ", stride[1], "]; pass two positive numbers");
  }
}

}  // namespace resnet_fused
