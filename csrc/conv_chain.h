// What conv_chain does on any device: its convolutions in order; a value goes as soon as nobody will read it.
#pragma once

#include <string>
#include <vector>

#include "checks/conv_chain.h"

namespace resnet_fused {

// One convolution of a chain.
struct ChainConvolution {
  const char* op;  // for errors
  const Tensor& x;
  const Tensor& weight;
  const OptionalTensor* behind;  // bias, mean, var, gamma, beta
  double eps;
  const OptionalTensor& residual;
  bool may_overwrite;  // the residual, which is the chain's own and read by nobody else
  const ChainStep& step;

  // Where the result of shape `sizes` goes: over the residual, or to what `allocate` gives.
  template <class Allocate>
  Tensor target(const std::vector<int64_t>& sizes, const Allocate& allocate) const {
    bool over = may_overwrite;
    for (int64_t i = 0; over && i < 4; ++i) over = residual->size(i) == sizes[i];
    return over ? *residual : allocate();
  }
};

// convolve(ChainConvolution) -> Tensor.
template <class Convolve>
Tensor run_chain(const Tensor& x, const OptionalTensor& residual, const std::vector<OptionalTensor>& tensors,
                 const std::vector<int64_t>& steps, const std::vector<double>& eps, const Convolve& convolve) {
  const std::vector<ChainStep> chain = check_conv_chain(x, residual, tensors, steps, eps);
  const size_t inputs = residual ? 2 : 1;
  std::vector<OptionalTensor> values(inputs + chain.size());
  std::vector<size_t> last(values.size(), 0);  // who reads a value last
  values[0] = x;
  if (residual) values[1] = residual;
  for (size_t i = 0; i < chain.size(); ++i) {
    last[chain[i].source] = i;
    if (chain[i].residual >= 0) last[chain[i].residual] = i;
  }
  const OptionalTensor none;
  for (size_t i = 0; i < chain.size(); ++i) {
    const ChainStep& s = chain[i];
    const bool adds = s.residual >= 0, own = adds && static_cast<size_t>(s.residual) >= inputs;
    const std::string op = name_of_step(i, chain.size());
    const OptionalTensor* given = tensors.data() + kChainTensors * i;
    values[inputs + i] = convolve(ChainConvolution{op.c_str(), *values[s.source], **given, given + 1, eps[i],
                                                   adds ? values[s.residual] : none,
                                                   own && last[s.residual] == i && s.residual != s.source, s});
    if (last[s.source] == i) values[s.source].reset();
    if (adds && last[s.residual] == i) values[s.residual].reset();
  }
  return *values.back();
}

}  // namespace resnet_fused
