// Batch norm and an activation: one read of z, one write of out. Bytes bind for all but SiLU and GELU, whose
// exponential takes about as long as their bytes.
#include <torch/csrc/stable/library.h>

#include "../checks/norm_act.h"
#include "activation.h"
#include "alloc.h"
#include "rows.h"

namespace resnet_fused::cpu {
namespace {

template <class T, Act act, class A = acc_t<T>>
RESNET_FUSED_CLONES void activate(T* __restrict out, const T* __restrict z, const A* __restrict scale,
                                  const A* __restrict shift, A slope, int64_t rows, int64_t C) {
  for (int64_t m = 0; m < rows; ++m, out += C, z += C) {
    for (int64_t c = 0; c < C; ++c) store(out + c, activation<act>(load(z + c) * scale[c] + shift[c], slope));
  }
}

Tensor norm_act(const Tensor& z, const Tensor& scale, const Tensor& shift, int64_t act, double slope) {
  check_norm_act(z, scale, shift, act);
  Tensor out = empty_channels_last(z);
  const Shape shape(z);
  for_element_type(z.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using A = acc_t<T>;
    for_act(act, [&](auto code) {
      parallel_rows(shape, [&](int64_t begin, int64_t end) {
        const int64_t first = begin * shape.channels;
        activate<T, code()>(data<T>(out) + first, data<T>(z) + first, data<A>(scale), data<A>(shift), A(slope),
                            end - begin, shape.channels);
      });
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { m.impl("norm_act", TORCH_BOX(&norm_act)); }

}  // namespace resnet_fused::cpu
