// How Winograd's convolutions share out their work, and ATen's convolution for what they cannot do.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>
#include <atomic>
#include <vector>

#include "../checks/common.h"

namespace resnet_fused::cpu {

// work(unit) for every unit, each by the thread that asks for it first; `make()` gives a thread its `work`.
template <class Make>
void share(int64_t units, const Make& make) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, units, 1, [&](int64_t, int64_t) {
    const auto work = make();
    for (int64_t unit = next++; unit < units; unit = next++) work(unit);
  });
}

inline StableIValue ints(std::vector<int64_t> values) { return torch::stable::detail::from(values); }

// conv2d(x, weight, padding=padding, stride=stride)
inline Tensor aten_convolution(const Tensor& x, const Tensor& weight, int64_t padding, int64_t stride = 1) {
  using torch::stable::detail::from;
  std::array<StableIValue, 9> stack{
      from(x),      from(weight), from(std::nullopt), ints({stride, stride}), ints({padding, padding}),
      ints({1, 1}), from(false),  ints({0, 0}),       from(int64_t(1))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace resnet_fused::cpu
