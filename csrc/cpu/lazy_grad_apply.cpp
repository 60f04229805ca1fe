// Materialise a lazy batch-norm gradient, a * (keep ? g : 0) + b * z + d + residual: one read of g, z and residual, one
// write of dz, which may be g itself.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "../checks/lazy_grad_apply.h"
#include "alloc.h"
#include "rows.h"

namespace resnet_fused::cpu {
namespace {

template <class A>
struct Vectors {
  const A *a, *b, *d, *scale, *shift;  // [C] each
};

// masked: keep = not (scale*z + shift <= 0); affine: b*z + d is added; joined: so is residual.
template <class T, bool masked, bool affine, bool joined, class A = acc_t<T>>
RESNET_FUSED_CLONES void apply(T* dz, const T* g, const T* __restrict z, const T* __restrict residual,
                               const Vectors<A>& v, int64_t rows, int64_t C) {
  const A* __restrict a = v.a, * __restrict b = v.b, * __restrict d = v.d;
  const A* __restrict scale = v.scale, * __restrict shift = v.shift;
  for (int64_t m = 0; m < rows; ++m, dz += C, g += C, z += masked || affine ? C : 0, residual += joined ? C : 0) {
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC ivdep  // dz is g or apart from it: no element depends on another
#endif
    for (int64_t c = 0; c < C; ++c) {
      A value = load(g + c);
      if constexpr (masked) value = load(z + c) * scale[c] + shift[c] <= 0 ? A(0) : value;
      value *= a[c];
      if constexpr (affine) value += load(z + c) * b[c] + d[c];
      if constexpr (joined) value += load(residual + c);
      store(dz + c, value);
    }
  }
}

struct Arguments {
  Tensor g;
  OptionalTensor z, a, b, d, scale, shift, sample_factor, residual, mask;
  Tensor dz;
};

template <class T, bool masked, bool affine, bool joined>
void run(const Arguments& t) {
  using A = acc_t<T>;
  const Shape shape(t.g);
  const int64_t C = shape.channels;
  const Vectors<A> plain{data<A>(t.a), data<A>(t.b), data<A>(t.d), data<A>(t.scale), data<A>(t.shift)};
  const auto rows = [&](const Vectors<A>& v, int64_t begin, int64_t end) {
    const T* z = masked || affine ? data<T>(t.z) + begin * C : nullptr;
    const T* residual = joined ? data<T>(t.residual) + begin * C : nullptr;
    apply<T, masked, affine, joined>(data<T>(t.dz) + begin * C, data<T>(t.g) + begin * C, z, residual, v, end - begin,
                                     C);
  };
  parallel_rows(shape, [&](int64_t begin, int64_t end) {
    if (!t.sample_factor) return rows(plain, begin, end);
    std::vector<A> a(C);  // times the sample's factor
    Vectors<A> factored = plain;
    factored.a = a.data();
    for_each_sample(shape, begin, end, [&](int64_t sample, int64_t first, int64_t stop) {
      const A factor = data<A>(*t.sample_factor)[sample];
      for (int64_t c = 0; c < C; ++c) a[c] = factor * plain.a[c];
      rows(factored, first, stop);
    });
  });
}

template <class T, bool masked, bool affine>
void run_with_or_without_residual(const Arguments& t) {
  t.residual ? run<T, masked, affine, true>(t) : run<T, masked, affine, false>(t);
}

void apply_checked(Arguments& t, bool in_place) {
  check_lazy_grad_apply(t.g, t.z, t.a, t.b, t.d, t.scale, t.shift, t.sample_factor, t.residual, t.mask);
  if (t.mask || !t.a) fail("lazy_grad_apply: got a mask, or no a; pass a and no mask on the CPU");
  if (in_place) check_lazy_grad_apply_in_place(t.g, t.residual);
  t.dz = in_place ? t.g : empty_channels_last(t.g);
  for_element_type(t.g.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    if (t.scale && t.b) return run_with_or_without_residual<T, true, true>(t);
    if (t.scale) return run_with_or_without_residual<T, true, false>(t);
    if (t.b) return run_with_or_without_residual<T, false, true>(t);
    run_with_or_without_residual<T, false, false>(t);
  });
}

Tensor lazy_grad_apply(const Tensor& g, const OptionalTensor& z, const OptionalTensor& a, const OptionalTensor& b,
                       const OptionalTensor& d, const OptionalTensor& scale, const OptionalTensor& shift,
                       const OptionalTensor& sample_factor, const OptionalTensor& residual,
                       const OptionalTensor& mask) {
  Arguments t{g, z, a, b, d, scale, shift, sample_factor, residual, mask, {}};
  apply_checked(t, false);
  return t.dz;
}

void lazy_grad_apply_(const Tensor& g, const OptionalTensor& z, const OptionalTensor& a, const OptionalTensor& b,
                      const OptionalTensor& d, const OptionalTensor& scale, const OptionalTensor& shift,
                      const OptionalTensor& sample_factor, const OptionalTensor& residual, const OptionalTensor& mask) {
  Arguments t{g, z, a, b, d, scale, shift, sample_factor, residual, mask, {}};
  apply_checked(t, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("lazy_grad_apply", TORCH_BOX(&lazy_grad_apply));
  m.impl("lazy_grad_apply_", TORCH_BOX(&lazy_grad_apply_));
}

}  // namespace resnet_fused::cpu
