// An uninitialised channels_last batch of `samples` images of the shape of those in `like`. For results that are
// written piece by piece.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "../checks/common.h"
#include "alloc.h"

namespace resnet_fused::cpu {
namespace {

Tensor new_batch(const Tensor& like, int64_t samples) {
  check_data("new_batch", "like", like);
  if (samples < 0) fail("new_batch: samples is ", samples, "; pass a number of images");
  return empty_images(samples, like.size(1), like.size(2), like.size(3), like.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { m.impl("new_batch", TORCH_BOX(&new_batch)); }

}  // namespace resnet_fused::cpu
