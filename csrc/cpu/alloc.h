// Allocation of outputs: large ones on kept memory, all others as PyTorch does.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <initializer_list>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../checks/common.h"
#include "kept_memory.h"

namespace resnet_fused::cpu {

// Buffers of 32 MiB and more are mapped anew by the C library at every call, where nothing is kept: ask for huge pages
// under [data, data + bytes) before anything touches it. Advice: a refusal changes nothing.
inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < size_t(32) << 20) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHugePage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

inline int32_t dtype_code(ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

template <size_t N>
Tensor empty_strided(const std::array<int64_t, N>& sizes, const std::array<int64_t, N>& strides, ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(N, sizes.data(), strides.data(), dtype_code(dtype),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline size_t bytes_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return 8;
    case ScalarType::Float: return 4;
    case ScalarType::BFloat16:
    case ScalarType::Half: return 2;
    default: return 0;  // no dtype of activations
  }
}

// An uninitialised channels_last tensor [n, c, h, w], exact strides also for ambiguous shapes.
inline Tensor empty_images(int64_t n, int64_t c, int64_t h, int64_t w, ScalarType dtype) {
  const std::array<int64_t, 4> sizes{n, c, h, w}, strides{h * w * c, 1, w * c, c};
  const size_t bytes = static_cast<size_t>(n * c * h * w) * bytes_of(dtype);
  AtenTensorHandle handle = nullptr;
  if (bytes >= kHugePage && kept_tensor(sizes, strides, dtype_code(dtype), bytes, &handle)) return Tensor(handle);
  Tensor out = empty_strided<4>(sizes, strides, dtype);
  advise_huge_pages(out.mutable_data_ptr(), bytes);
  return out;
}

inline Tensor empty_channels_last(const Tensor& like) {
  return empty_images(like.size(0), like.size(1), like.size(2), like.size(3), like.scalar_type());
}

inline Tensor empty_vector(int64_t size, ScalarType dtype) { return empty_strided<1>({size}, {1}, dtype); }

// A per-channel vector for the activations `x`; empty if its tensor is absent.
inline Tensor empty_stats(const Tensor& x, bool present = true) {
  return empty_vector(present ? x.size(1) : 0, stat_dtype(x.scalar_type()));
}

}  // namespace resnet_fused::cpu
