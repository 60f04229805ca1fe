// The gradient of what batch norm read, behind an activation: one read of g and z, one write of dz, which may be g.
#include <torch/csrc/stable/library.h>

#include "../checks/norm_act_apply.h"
#include "activation.h"
#include "alloc.h"
#include "rows.h"

namespace resnet_fused::cpu {
namespace {

template <class A>
struct Vectors {
  const A *a, *b, *d, *scale, *shift;  // [C] each; b and d may be null
};

template <class T, Act act, bool affine, class A = acc_t<T>>
RESNET_FUSED_CLONES void apply(T* dz, const T* g, const T* __restrict z, const Vectors<A>& v, A slope, int64_t rows,
                               int64_t C) {
  const A* __restrict a = v.a, * __restrict b = v.b, * __restrict d = v.d;
  const A* __restrict scale = v.scale, * __restrict shift = v.shift;
  for (int64_t m = 0; m < rows; ++m, dz += C, g += C, z += C) {
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC ivdep  // dz is g or apart from it: no element depends on another
#endif
    for (int64_t c = 0; c < C; ++c) {
      const A raw = load(z + c);
      A value = a[c] * activation_gradient<act>(A(load(g + c)), raw * scale[c] + shift[c], slope);
      if constexpr (affine) value += raw * b[c] + d[c];
      store(dz + c, value);
    }
  }
}

struct Arguments {
  Tensor g, z, a;
  OptionalTensor b, d;
  Tensor scale, shift, dz;
};

template <class T, Act act, bool affine>
void run(const Arguments& t, acc_t<T> slope) {
  using A = acc_t<T>;
  const Shape shape(t.g);
  const Vectors<A> v{data<A>(t.a), data<A>(t.b), data<A>(t.d), data<A>(t.scale), data<A>(t.shift)};
  parallel_rows(shape, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * shape.channels;
    apply<T, act, affine>(data<T>(t.dz) + first, data<T>(t.g) + first, data<T>(t.z) + first, v, slope, end - begin,
                          shape.channels);
  });
}

void run_checked(const Arguments& t, int64_t act, double slope) {
  for_element_type(t.g.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    for_act(act, [&](auto code) {
      t.b ? run<T, code(), true>(t, acc_t<T>(slope)) : run<T, code(), false>(t, acc_t<T>(slope));
    });
  });
}

Tensor norm_act_apply(const Tensor& g, const Tensor& z, const Tensor& a, const OptionalTensor& b,
                      const OptionalTensor& d, const Tensor& scale, const Tensor& shift, int64_t act, double slope) {
  check_norm_act_apply(g, z, a, b, d, scale, shift, act);
  const Arguments t{g, z, a, b, d, scale, shift, empty_channels_last(g)};
  run_checked(t, act, slope);
  return t.dz;
}

void norm_act_apply_(const Tensor& g, const Tensor& z, const Tensor& a, const OptionalTensor& b,
                     const OptionalTensor& d, const Tensor& scale, const Tensor& shift, int64_t act, double slope) {
  check_norm_act_apply(g, z, a, b, d, scale, shift, act);
  run_checked({g, z, a, b, d, scale, shift, g}, act, slope);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("norm_act_apply", TORCH_BOX(&norm_act_apply));
  m.impl("norm_act_apply_", TORCH_BOX(&norm_act_apply_));
}

}  // namespace resnet_fused::cpu
