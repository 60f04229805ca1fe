// An uninitialised channels_last tensor in huge pages, for results that are put together from pieces.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "../check.h"
#include "alloc.h"

namespace resnet_fused::cpu {
namespace {

Tensor empty_channels_last_sized(const Tensor& like, std::vector<int64_t> size) {
  if (size.size() != 4) fail("empty_channels_last: size has ", size.size(), " entries; pass [N, C, H, W]");
  const int64_t n = size[0], c = size[1], h = size[2], w = size[3];
  Tensor out = empty_strided<4>({n, c, h, w}, {h * w * c, 1, w * c, c}, like.scalar_type());
  advise_huge_pages(out.mutable_data_ptr(), static_cast<size_t>(out.numel()) * out.element_size());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("empty_channels_last", TORCH_BOX(&empty_channels_last_sized));
}

}  // namespace resnet_fused::cpu
