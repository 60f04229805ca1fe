// An uninitialised channels_last batch of `samples` images of the shape of those in `like`, in huge pages where it is
// large. For results that are written piece by piece.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "../checks/common.h"
#include "alloc.h"

namespace resnet_fused::cpu {
namespace {

Tensor new_batch(const Tensor& like, int64_t samples) {
  check_data("new_batch", "like", like);
  if (samples < 0) fail("new_batch: samples is ", samples, "; pass a number of images");
  const int64_t c = like.size(1), h = like.size(2), w = like.size(3);
  Tensor out = empty_strided<4>({samples, c, h, w}, {h * w * c, 1, w * c, c}, like.scalar_type());
  advise_huge_pages(out.mutable_data_ptr(), static_cast<size_t>(out.numel()) * out.element_size());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { m.impl("new_batch", TORCH_BOX(&new_batch)); }

}  // namespace resnet_fused::cpu
