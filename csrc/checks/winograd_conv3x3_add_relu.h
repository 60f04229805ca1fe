// Argument errors of winograd_conv3x3_add_relu.
#pragma once

#include "winograd_weight3x3.h"

namespace resnet_fused {

inline constexpr int64_t kPackedColumns = 32;    // output channels of a panel of the transformed weight
inline constexpr int64_t kStridedChannels = 16;  // with a stride of 2, input channels are so many or some times as many

inline bool is_packed(const Tensor& packed, const Tensor& weight, int64_t stride) {
  const int64_t panels = (weight.size(0) + kPackedColumns - 1) / kPackedColumns;
  return packed.scalar_type() == ScalarType::Float && packed.dim() == 4 && packed.size(0) == panels &&
         (stride == 2 ? packed.size(1) == 25 : packed.size(1) == 16 || packed.size(1) == 36) &&
         packed.size(2) == weight.size(1) && packed.size(3) == kPackedColumns && packed.is_contiguous();
}

inline void check_winograd_conv3x3_add_relu(const Tensor& x, const Tensor& weight, const Tensor& packed,
                                            const OptionalTensor& scale, const OptionalTensor& shift, int64_t padding,
                                            int64_t stride) {
  const char* op = "winograd_conv3x3_add_relu";
  check_data(op, "x", x);
  check_device(op, "weight", weight, x);
  check_device(op, "packed", packed, x);
  if (x.scalar_type() != ScalarType::Float || weight.scalar_type() != ScalarType::Float) {
    fail(op, ": got ", x.scalar_type(), " x and ", weight.scalar_type(), " weight; pass Float");
  }
  if (x.size(1) == 0) fail(op, ": x has no channels; pass one or more");
  if (padding != 0 && padding != 1) fail(op, ": padding is ", padding, "; pass 0 or 1");
  if (weight.dim() != 4 || weight.size(1) != x.size(1) || weight.size(2) != 3 || weight.size(3) != 3) {
    fail(op, ": weight has shape ", shape_of(weight), "; pass [K, ", x.size(1), ", 3, 3]");
  }
  if (stride != 1 && stride != 2) fail(op, ": stride is ", stride, "; pass 1 or 2");
  if (stride == 2 && x.size(1) % kStridedChannels != 0) {
    fail(op, ": x has ", x.size(1), " channels with a stride of 2; pass a multiple of ", kStridedChannels);
  }
  if (!is_packed(packed, weight, stride)) {
    fail(op, ": packed is ", packed.scalar_type(), " of shape ", shape_of(packed),
         "; pass what winograd_weight3x3 makes of this weight and stride");
  }
  const int64_t lost = 2 - 2 * padding;
  if (x.size(2) <= lost || x.size(3) <= lost) {
    fail(op, ": x of shape ", shape_of(x), " is smaller than the kernel; pass larger images, or padding=1");
  }
  check_winograd_vector(op, "scale", scale, weight);
  check_winograd_vector(op, "shift", shift, weight);
}

}  // namespace resnet_fused
