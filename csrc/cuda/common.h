// What every csrc/cuda/<op>.cpp does around its kernel: outputs, pointers, stream, and the error of a launch.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../checks/common.h"
#include "../params.h"
#include "launches.h"

namespace resnet_fused::cuda {

using torch::stable::accelerator::DeviceGuard;

inline Extent extent_of(const Tensor& x) {
  return {x.size(0) * x.size(2) * x.size(3), x.size(1), x.size(2) * x.size(3)};
}

template <class T>
const T* pointer(const OptionalTensor& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

template <class T>
T* output(const Tensor& t) {
  return t.numel() ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
}

inline Tensor empty_like(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype,
                         std::optional<torch::headeronly::MemoryFormat> format = std::nullopt) {
  return torch::stable::empty({sizes.begin(), sizes.size()}, dtype, std::nullopt, like.device(), std::nullopt, format);
}

// Activations like `like`, of another shape: without the dispatcher's boxes, which take longer than the allocation.
inline Tensor empty_images(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w) {
  const int64_t sizes[4] = {n, c, h, w}, strides[4] = {h * w * c, 1, w * c, c};
  int32_t dtype = 0, device = 0;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, sizes, strides, dtype, device, like.get_device_index(), &handle));
  return Tensor(handle);
}

// Exact channels_last strides, also for ambiguous shapes.
inline Tensor empty_channels_last(const Tensor& like) {
  return empty_like(like, {like.size(0), like.size(1), like.size(2), like.size(3)}, like.scalar_type(),
                    torch::headeronly::MemoryFormat::ChannelsLast);
}

inline cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Of the ops that take vectors alone, which the checks admit in Double too.
inline void check_float(const char* op, const char* name, const Tensor& t) {
  if (t.scalar_type() != ScalarType::Float) {
    fail(op, ": ", name, " is ", t.scalar_type(), "; pass Float, or use another backend");
  }
}

// The error of the launches of `op` so far, if there was one; `x` is what they were for.
inline void check_launch(const char* op, const Tensor& x) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
  fail(op, ": CUDA launch failed on ", x.dim() == 4 ? "activations" : "a tensor", " of shape ", shape_of(x), ": ",
       cudaGetErrorString(error),
       error == cudaErrorNoKernelImageForDevice
           ? "; rebuild with this GPU's compute capability in TORCH_CUDA_ARCH_LIST, or use another backend"
           : "");
}

// f(T{}) with the element type of `x`, which check_data() has admitted; then the launch error, if there was one.
template <class F>
void launch_as(const char* op, const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: f(float{}); break;
    case ScalarType::Half: f(__half{}); break;
    default: f(__nv_bfloat16{}); break;
  }
  check_launch(op, x);
}

}  // namespace resnet_fused::cuda
