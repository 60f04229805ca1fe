// Allocation of outputs. Buffers of 32 MiB and more are mapped anew by the C library at every call, and faulting them
// in 4 KiB at a time can cost more than the arithmetic of a pointwise kernel, so huge pages are asked for under them.
// Smaller ones come from the heap, whose pages may be there already. That the limit makes no difference to blocks by
// themselves was measured: benchmarks/results/epyc-avx512-2core/runs.jsonl:5.
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

namespace resnet_fused::cpu {

inline constexpr size_t kHugePage = size_t(2) << 20, kMapped = size_t(32) << 20;

// Ask for huge pages under [data, data + bytes), before anything touches it. Advice: a refusal changes nothing.
inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < kMapped) return;
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

// An uninitialised channels_last tensor of the shape of `like`, [N, C, H, W], exact strides also for ambiguous shapes.
inline Tensor empty_channels_last(const Tensor& like) {
  const int64_t n = like.size(0), c = like.size(1), h = like.size(2), w = like.size(3);
  Tensor out = empty_strided<4>({n, c, h, w}, {h * w * c, 1, w * c, c}, like.scalar_type());
  advise_huge_pages(out.mutable_data_ptr(), static_cast<size_t>(out.numel()) * out.element_size());
  return out;
}

inline Tensor empty_vector(int64_t size, ScalarType dtype) { return empty_strided<1>({size}, {1}, dtype); }

// A per-channel vector for the activations `x`; empty if its tensor is absent.
inline Tensor empty_stats(const Tensor& x, bool present = true) {
  return empty_vector(present ? x.size(1) : 0, stat_dtype(x.scalar_type()));
}

}  // namespace resnet_fused::cpu
