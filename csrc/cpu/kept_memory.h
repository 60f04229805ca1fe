// Memory that outputs of 2 MiB and more come from, and return to when the last tensor on it dies.
//
// The C library maps large buffers anew at every call and unmaps them when they die, so every step of a training run
// faults its activations in again, page by page, and the kernel zeroes what is about to be overwritten. Kept memory is
// faulted in once. See kept_memory.cpp for the rules.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstddef>
#include <cstdint>

#include "../checks/common.h"

namespace resnet_fused::cpu {

inline constexpr size_t kHugePage = size_t(2) << 20;

// An uninitialised 4-dimensional tensor on kept memory of `bytes`; false if there is none, and an ordinary one is due.
bool kept_tensor(const std::array<int64_t, 4>& sizes, const std::array<int64_t, 4>& strides, int32_t dtype,
                 size_t bytes, AtenTensorHandle* out);

}  // namespace resnet_fused::cpu
