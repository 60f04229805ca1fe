// What conv1x1 and conv_values are: one kernel, compiled once.
#pragma once

#include "conv_geometry.h"
#include "statistics.h"

namespace resnet_fused::cuda {

using Convolved = decltype(std::tuple_cat(std::tuple<Tensor>(), Statistics()));

// The convolution of checked arguments, and its statistics if `emit_stats`; `weight` in channels_last.
Convolved convolve_values(const char* op, const Tensor& x, const Tensor& weight, const OptionalTensor& x_scale,
                          const OptionalTensor& x_shift, const ConvGeometry& geometry, bool emit_stats,
                          const OptionalTensor& gamma, const OptionalTensor& beta, std::optional<double> eps);

}  // namespace resnet_fused::cuda
