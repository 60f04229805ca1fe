// Multiply by a factor for each sample and channel, add, clamp: one read of z and residual, one write of out, which
// may be z itself.
#include <torch/csrc/stable/library.h>

#include <limits>

#include "../checks/gate_add_relu.h"
#include "alloc.h"
#include "rows.h"

namespace resnet_fused::cpu {
namespace {

// out = max(factor*z + term + r, floor) for rows of one sample; `floor` is -inf without a ReLU. NaN and -0.0 pass.
template <class T, bool with_term, bool joined, class A = acc_t<T>>
RESNET_FUSED_CLONES void gate(T* out, const T* z, const T* __restrict residual, const A* __restrict factor,
                              const A* __restrict term, A floor, int64_t rows, int64_t C) {
  for (int64_t m = 0; m < rows; ++m, out += C, z += C, residual += joined ? C : 0) {
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC ivdep  // out is z or apart from it: no element depends on another
#endif
    for (int64_t c = 0; c < C; ++c) {
      A y = load(z + c) * factor[c];
      if constexpr (with_term) y += term[c];
      if constexpr (joined) y += load(residual + c);
      store(out + c, y < floor ? floor : y);
    }
  }
}

struct Arguments {
  Tensor z, factor;
  std::optional<Tensor> term, residual;
  bool relu;
  Tensor out;
};

template <class T, bool with_term, bool joined>
void run(const Arguments& a) {
  using A = acc_t<T>;
  const Shape shape(a.z);
  const int64_t C = shape.channels;
  const A floor = a.relu ? A(0) : -std::numeric_limits<A>::infinity();
  parallel_rows(shape, [&](int64_t begin, int64_t end) {
    for_each_sample(shape, begin, end, [&](int64_t sample, int64_t first, int64_t stop) {
      const T* residual = joined ? data<T>(a.residual) + first * C : nullptr;
      const A* term = with_term ? data<A>(a.term) + sample * C : nullptr;
      gate<T, with_term, joined>(data<T>(a.out) + first * C, data<T>(a.z) + first * C, residual,
                                 data<A>(a.factor) + sample * C, term, floor, stop - first, C);
    });
  });
}

void run_any(const Arguments& a) {
  for_element_type(a.z.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    if (a.term) return a.residual ? run<T, true, true>(a) : run<T, true, false>(a);
    a.residual ? run<T, false, true>(a) : run<T, false, false>(a);
  });
}

Tensor gate_add_relu(const Tensor& z, const Tensor& factor, const std::optional<Tensor>& term,
                     const std::optional<Tensor>& residual, bool relu) {
  check_gate_add_relu(z, factor, term, residual);
  const Arguments a{z, factor, term, residual, relu, empty_channels_last(z)};
  run_any(a);
  return a.out;
}

void gate_add_relu_(const Tensor& z, const Tensor& factor, const std::optional<Tensor>& term,
                    const std::optional<Tensor>& residual, bool relu) {
  check_gate_add_relu(z, factor, term, residual);
  check_gate_add_relu_in_place(z, residual);
  run_any({z, factor, term, residual, relu, z});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("gate_add_relu", TORCH_BOX(&gate_add_relu));
  m.impl("gate_add_relu_", TORCH_BOX(&gate_add_relu_));
}

}  // namespace resnet_fused::cpu
