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
  const ChainConvolution* projection;  // computed and added in the same launch; or null

  // Where the result of shape `sizes` goes: over the residual, or to what `allocate` gives.
  template <class Allocate>
  Tensor target(const std::vector<int64_t>& sizes, const Allocate& allocate) const {
    bool over = may_overwrite;
    for (int64_t i = 0; over && i < 4; ++i) over = residual->size(i) == sizes[i];
    return over ? *residual : allocate();
  }
};

// Whether each pixel of the result is made of one.
inline bool is_pointwise(const ChainStep& s, const Tensor& weight) {
  return weight.dim() == 4 && weight.size(2) == 1 && weight.size(3) == 1 && s.padding[0] == 0 && s.padding[1] == 0;
}

// Of each convolution of `chain`, the projection that it adds and nobody else reads, both being 1x1; or -1. As `joined`
// in resnet_fused/ops/conv_chain.py.
inline std::vector<int64_t> projections_of(const std::vector<ChainStep>& chain,
                                           const std::vector<OptionalTensor>& tensors, size_t inputs) {
  std::vector<int> reads(inputs + chain.size(), 0);
  for (const ChainStep& s : chain) {
    ++reads[s.source];
    if (s.residual >= 0) ++reads[s.residual];
  }
  const auto pointwise = [&](size_t i) { return is_pointwise(chain[i], *tensors[kChainTensors * i]); };
  std::vector<int64_t> found(chain.size(), -1);
  for (size_t i = 0; i < chain.size(); ++i) {
    const ChainStep& s = chain[i];
    const int64_t made = s.residual - static_cast<int64_t>(inputs);
    if (made < 0 || reads[s.residual] > 1 || s.stride[0] != 1 || s.stride[1] != 1 || !pointwise(i)) continue;
    if (chain[made].residual < 0 && !chain[made].relu && pointwise(made)) found[i] = made;
  }
  return found;
}

// convolve(ChainConvolution) -> Tensor. `joins`: it computes projections too.
template <class Convolve>
Tensor run_chain(const Tensor& x, const OptionalTensor& residual, const std::vector<OptionalTensor>& tensors,
                 const std::vector<int64_t>& steps, const std::vector<double>& eps, const Convolve& convolve,
                 bool joins = false) {
  const std::vector<ChainStep> chain = check_conv_chain(x, residual, tensors, steps, eps);
  const size_t inputs = residual ? 2 : 1;
  std::vector<int64_t> projections(chain.size(), -1);
  if (joins) projections = projections_of(chain, tensors, inputs);
  std::vector<bool> waits(chain.size(), false);  // for whoever adds it
  std::vector<OptionalTensor> values(inputs + chain.size());
  std::vector<size_t> last(values.size(), 0);  // who reads a value last
  values[0] = x;
  if (residual) values[1] = residual;
  for (size_t i = 0; i < chain.size(); ++i) {
    last[chain[i].source] = i;
    if (projections[i] >= 0) {
      waits[projections[i]] = true;
      last[chain[projections[i]].source] = i;
    } else if (chain[i].residual >= 0) {
      last[chain[i].residual] = i;
    }
  }
  std::vector<std::string> ops;
  for (size_t i = 0; i < chain.size(); ++i) ops.push_back(name_of_step(i, chain.size()));
  const OptionalTensor none;
  const auto convolution = [&](size_t i, const OptionalTensor& added, bool over, const ChainConvolution* projection) {
    const OptionalTensor* given = tensors.data() + kChainTensors * i;
    return ChainConvolution{ops[i].c_str(), *values[chain[i].source], **given, given + 1, eps[i], added, over, chain[i],
                            projection};
  };
  for (size_t i = 0; i < chain.size(); ++i) {
    if (waits[i]) continue;
    const ChainStep& s = chain[i];
    if (projections[i] >= 0) {
      const ChainConvolution projection = convolution(projections[i], none, false, nullptr);
      values[inputs + i] = convolve(convolution(i, none, false, &projection));
    } else {
      const bool adds = s.residual >= 0, own = adds && static_cast<size_t>(s.residual) >= inputs;
      const bool over = own && last[s.residual] == i && s.residual != s.source;
      values[inputs + i] = convolve(convolution(i, adds ? values[s.residual] : none, over, nullptr));
    }
    for (size_t value = 0; value < inputs + i; ++value) {
      if (last[value] == i) values[value].reset();
    }
  }
  return *values.back();
}

}  // namespace resnet_fused
