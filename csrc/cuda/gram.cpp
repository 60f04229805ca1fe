// gram for CUDA tensors; the meaning is in resnet_fused/ops/gram.py, the kernels in kernels/.

#include "../checks/gram.h"
#include "common.h"

namespace resnet_fused::cuda {
namespace {

// The pixels that a stride leaves, which the kernels count in 32 bits.
PixelGrid pixel_grid(const Tensor& a, const std::vector<int64_t>& stride) {
  constexpr int64_t kMost = int64_t(1) << 31;
  if (a.numel() >= kMost || a.size(1) * a.size(1) >= kMost) {
    fail("gram: a of shape ", shape_of(a), " or the result has 2^31 elements or more; pass a smaller batch, or use ",
         "another backend");
  }
  const auto i = [](int64_t value) { return static_cast<int>(value); };
  // A stride beyond the image, of any size, leaves one pixel.
  const auto step = [&](int side) { return std::min(stride[side], std::max<int64_t>(a.size(2 + side), 1)); };
  const auto left = [&](int side) { return (a.size(2 + side) + step(side) - 1) / step(side); };
  if (a.numel() == 0) return {0, 0, 0, 0, 0, 1, 1};
  return {i(a.size(0)), i(a.size(2)), i(a.size(3)), i(left(0)), i(left(1)), i(step(0)), i(step(1))};
}

std::tuple<Tensor, Tensor> gram(const Tensor& a, const Tensor& centre, const OptionalTensor& scale,
                                const OptionalTensor& shift, std::vector<int64_t> stride) {
  check_gram(a, centre, scale, shift, stride);
  const PixelGrid grid = pixel_grid(a, stride);
  const DeviceGuard guard(a.get_device_index());
  const int64_t channels = a.size(1);
  Tensor gram = empty_like(a, {channels, channels}, ScalarType::Float);
  Tensor total = empty_like(a, {channels}, ScalarType::Float);
  GramParams params{grid,
                    static_cast<int>(channels),
                    a.numel() ? a.const_data_ptr() : nullptr,
                    pointer<float>(centre),
                    pointer<float>(scale),
                    pointer<float>(shift),
                    nullptr,
                    output<float>(gram),
                    output<float>(total)};
  Tensor scratch = empty_like(a, {0}, ScalarType::Float);
  const cudaStream_t stream = current_stream(a);
  launch_as("gram", a, [&](auto t) {
    using T = decltype(t);
    scratch = empty_like(a, {gram_partial_floats<T>(params)}, ScalarType::Float);
    params.partial = output<float>(scratch);
    launch_gram<T>(params, stream);
  });
  return {gram, total};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, m) { m.impl("gram", TORCH_BOX(&gram)); }

}  // namespace resnet_fused::cuda
