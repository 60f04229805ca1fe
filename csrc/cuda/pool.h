// What the CUDA ops of the stem's pooling share: where windows lie.
#pragma once

#include <algorithm>
#include <vector>

#include "common.h"

namespace resnet_fused::cuda {

// The kernels count in 32 bits along a side of an image, twice around it.
constexpr int64_t kMostPixelsOfPool = int64_t(1) << 30;

inline PoolAxis pool_axis(const char* op, const Tensor& z, int dim, int64_t kernel, int64_t stride, int64_t padding) {
  const int64_t size = z.size(dim), padded = size + 2 * padding;
  if (padded >= kMostPixelsOfPool) {
    fail(op, ": z of shape ", shape_of(z), " has ", padded, " padded pixels to a side; pass less than ",
         kMostPixelsOfPool, ", or use another backend");
  }
  // A stride beyond the image, of any size, leaves the one window where it is.
  const auto i = [](int64_t value) { return static_cast<int>(value); };
  return {i(size), i((padded - kernel) / stride + 1), i(kernel), i(std::min(stride, padded)), i(padding)};
}

// Of arguments that check_pooling() has admitted.
inline PoolGeometry pool_geometry(const char* op, const Tensor& z, const std::vector<int64_t>& kernel,
                                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding) {
  return {z.size(0), z.size(1), pool_axis(op, z, 2, kernel[0], stride[0], padding[0]),
          pool_axis(op, z, 3, kernel[1], stride[1], padding[1])};
}

}  // namespace resnet_fused::cuda
