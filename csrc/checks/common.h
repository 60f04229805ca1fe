// What the checks of csrc/checks/<op>.h share, and the one place where C++ words an argument error: what came, what is
// accepted, what to do. CPU and CUDA kernels call check_<op>() first and may then trust shapes, dtypes, devices and
// strides.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

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

// Two vectors that make sense only together.
inline void check_pair(const char* op, const char* name, const OptionalTensor& t, const char* other_name,
                       const OptionalTensor& other, const Tensor& data) {
  if (t.has_value() != other.has_value()) {
    fail(op, ": got ", t ? name : other_name, " without ", t ? other_name : name, "; pass both or neither");
  }
  if (t) check_vector(op, name, *t, data);
  if (other) check_vector(op, other_name, *other, data);
}

inline void check_factor(const char* op, const OptionalTensor& factor, const Tensor& data) {
  if (factor) check_vector(op, "sample_factor", *factor, data, 0);
}

}  // namespace resnet_fused
