// The ops of csrc/cuda, checks, allocation and all, registered for CPU tensors as resnet_fused_cuda_on_cpu::<op>.

#define USE_CUDA
#include "cuda_on_cpu.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

// What a CPU-only torch does not have: a stream and a device to guard.
extern "C" {
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = reinterpret_cast<DeviceGuardHandle>(guard);
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }
}

namespace resnet_fused::cuda {}
namespace resnet_fused_cuda_on_cpu::cuda {
using namespace ::resnet_fused::cuda;  // instructions.h
}

// From here on, in our own sources only:
#define CUDA CPU
#define resnet_fused resnet_fused_cuda_on_cpu

#include "../../csrc/cuda/kernels/bn_affine.cuh"
#include "../../csrc/cuda/kernels/bn_coefficients.cuh"
#include "../../csrc/cuda/kernels/bn_stats.cuh"
#include "../../csrc/cuda/kernels/conv1x1.cuh"
#include "../../csrc/cuda/kernels/conv1x1_dgrad.cuh"
#include "../../csrc/cuda/kernels/conv1x1_join.cuh"
#include "../../csrc/cuda/kernels/conv1x1_wgrad.cuh"
#include "../../csrc/cuda/kernels/conv_norm_add_relu.cuh"
#include "../../csrc/cuda/kernels/gram.cuh"
#include "../../csrc/cuda/kernels/gram_grad.cuh"
#include "../../csrc/cuda/kernels/gram_norm.cuh"
#include "../../csrc/cuda/kernels/lazy_grad_apply.cuh"
#include "../../csrc/cuda/kernels/norm_add_relu.cuh"
#include "../../csrc/cuda/kernels/norm_add_relu_backward.cuh"
#include "../../csrc/cuda/kernels/norm_relu_pool.cuh"
#include "../../csrc/cuda/kernels/norm_relu_pool_apply.cuh"
#include "../../csrc/cuda/kernels/norm_relu_pool_backward.cuh"

#include "../../csrc/cuda/bn_affine.cpp"
#include "../../csrc/cuda/bn_coefficients.cpp"
#include "../../csrc/cuda/bn_stats.cpp"
#include "../../csrc/cuda/conv1x1.cpp"
#include "../../csrc/cuda/conv1x1_dgrad.cpp"
#include "../../csrc/cuda/conv1x1_join.cpp"
#include "../../csrc/cuda/conv1x1_wgrad.cpp"
#include "../../csrc/cuda/conv_chain.cpp"
#include "../../csrc/cuda/conv_join.cpp"
#include "../../csrc/cuda/conv_norm_add_relu.cpp"
#include "../../csrc/cuda/conv_values.cpp"
#include "../../csrc/cuda/gram.cpp"
#include "../../csrc/cuda/gram_grad.cpp"
#include "../../csrc/cuda/gram_norm.cpp"
#include "../../csrc/cuda/lazy_grad_apply.cpp"
#include "../../csrc/cuda/norm_add_relu.cpp"
#include "../../csrc/cuda/norm_add_relu_backward.cpp"
#include "../../csrc/cuda/norm_relu_pool.cpp"
#include "../../csrc/cuda/norm_relu_pool_apply.cpp"
#include "../../csrc/cuda/norm_relu_pool_backward.cpp"
