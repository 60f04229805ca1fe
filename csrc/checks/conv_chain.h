// Argument errors of conv_chain, and its steps as the kernels take them.
#pragma once

#include <string>
#include <vector>

#include "conv_norm_add_relu.h"

namespace resnet_fused {

// Entries of `steps` and of `tensors` for each convolution.
constexpr size_t kChainInts = 9, kChainTensors = 6;

struct ChainStep {
  int64_t source, residual;  // the values that it reads; no residual: -1
  bool relu;
  std::vector<int64_t> stride, padding, dilation;
};

// What a convolution of the chain is called in errors.
inline std::string name_of_step(size_t i, size_t count) {
  return "conv_chain, convolution " + std::to_string(i + 1) + " of " + std::to_string(count);
}

// Shapes are checked by check_conv_norm_add_relu, as soon as the values before are there.
inline std::vector<ChainStep> check_conv_chain(const Tensor& x, const OptionalTensor& residual,
                                               const std::vector<OptionalTensor>& tensors,
                                               const std::vector<int64_t>& steps, const std::vector<double>& eps) {
  const char* op = "conv_chain";
  check_data(op, "x", x);
  if (residual) check_device(op, "residual", *residual, x);
  const size_t count = eps.size(), inputs = residual ? 2 : 1;
  if (count == 0 || steps.size() != kChainInts * count || tensors.size() != kChainTensors * count) {
    fail(op, ": got ", tensors.size(), " tensors, ", steps.size(), " integers and ", count, " eps; pass ",
         kChainTensors, ", ", kChainInts, " and 1 for each convolution, of which there must be one");
  }
  std::vector<ChainStep> found;
  found.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const int64_t* s = steps.data() + kChainInts * i;
    const int64_t made = static_cast<int64_t>(inputs + i);
    if (s[0] < 0 || s[0] >= made || s[1] < -1 || s[1] >= made) {
      fail(name_of_step(i, count), ": reads the values ", s[0], " and ", s[1], "; pass those that are there, below ",
           made, ", or -1 for no residual");
    }
    if (!tensors[kChainTensors * i]) fail(name_of_step(i, count), ": has no weight; pass one");
    found.push_back({s[0], s[1], s[2] != 0, {s[3], s[4]}, {s[5], s[6]}, {s[7], s[8]}});
  }
  return found;
}

}  // namespace resnet_fused
