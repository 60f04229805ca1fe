// What the gradients of a 1x1 convolution share: their lazy arguments as launches take them, and the weight's gradient,
// which is an op of its own and part of the other.
#pragma once

#include <vector>

#include "../checks/conv1x1_gradient.h"
#include "../gradient_params.h"
#include "conv_geometry.h"

namespace resnet_fused::cuda {

// The kernels count in 32 bits; of x all pixels, of g what it is of.
inline void check_sizes(const char* op, const Tensor& g, const OptionalTensor& x, int64_t outputs, int64_t inputs) {
  const int64_t rows = g.size(0) * g.size(2) * g.size(3), most = outputs > inputs ? outputs : inputs;
  const int64_t read = x ? x->numel() : 0;
  if (rows * most >= kMostElements || read >= kMostElements || (outputs + 1) * inputs >= kMostElements ||
      inputs * inputs >= kMostElements) {
    fail(op, ": g of shape ", shape_of(g),
         ", x, the result or a matrix has 2^31 elements or more; pass a smaller batch, or use another backend");
  }
}

inline LazyGradient gradient_of(const Tensor& g, const OptionalTensor& mask, const OptionalTensor& z,
                                const OptionalTensor& a, const OptionalTensor& b, const OptionalTensor& d,
                                const OptionalTensor& scale, const OptionalTensor& shift,
                                const OptionalTensor& sample_factor) {
  const bool recomputed = scale && !mask;  // the bits decide
  const int64_t image = g.size(2) * g.size(3);
  return {static_cast<int>(g.size(0) * image),
          static_cast<int>(g.size(1)),
          static_cast<int>(image),
          g.numel() ? g.const_data_ptr() : nullptr,
          b || recomputed ? pointer<void>(z) : nullptr,
          pointer<uint8_t>(mask),
          pointer<float>(a),
          pointer<float>(b),
          pointer<float>(d),
          recomputed ? pointer<float>(scale) : nullptr,
          recomputed ? pointer<float>(shift) : nullptr,
          pointer<float>(sample_factor)};
}

// Of as many pixels as `g` has.
inline LazyInput input_of(const Tensor& g, const OptionalTensor& x, int64_t channels, const OptionalTensor& scale,
                          const OptionalTensor& shift, const std::vector<int64_t>& stride) {
  const auto i = [](int64_t value) { return static_cast<int>(value); };
  return {i(g.size(0) * g.size(2) * g.size(3)),
          i(channels),
          i(x ? x->size(2) : g.size(2)),
          i(x ? x->size(3) : g.size(3)),
          i(g.size(2)),
          i(g.size(3)),
          i(stride[0]),
          i(stride[1]),
          pointer<void>(x),
          pointer<float>(scale),
          pointer<float>(shift)};
}

// The partial sums of a weight's gradient: the launch is on its way when this returns.
struct WgradSums {
  Tensor partial;  // [splits, k*c + k]
  int splits;      // 0: there are no pixels, or the weight is empty
};
WgradSums start_wgrad(const char* op, const Tensor& g, Conv1x1WgradParams params, cudaStream_t stream);

}  // namespace resnet_fused::cuda
