// Normalise, add the residual, clamp, and pack the sign mask: one read of z and residual, one write of out.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>
#include <vector>

#include "../checks/norm_add_relu.h"
#include "alloc.h"
#include "bits.h"
#include "rows.h"

namespace resnet_fused::cpu {
namespace {

enum class Residual { kNone, kPlain, kAffine };

template <class A>
struct Vectors {
  const A *scale, *shift, *residual_scale, *residual_shift;  // [C] each
};

// out = max(scale*z + shift + r, floor) for rows of C; `floor` is -inf without a ReLU. NaN and -0.0 pass.
template <class T, Residual kind, class A = acc_t<T>>
RESNET_FUSED_CLONES void normalise(T* __restrict out, const T* __restrict z, const T* __restrict residual,
                                   const Vectors<A>& v, A floor, int64_t rows, int64_t C) {
  const A* __restrict scale = v.scale, * __restrict shift = v.shift;
  const A* __restrict residual_scale = v.residual_scale, * __restrict residual_shift = v.residual_shift;
  for (int64_t m = 0; m < rows; ++m, out += C, z += C, residual += kind == Residual::kNone ? 0 : C) {
    for (int64_t c = 0; c < C; ++c) {
      A y = load(z + c) * scale[c] + shift[c];
      if constexpr (kind == Residual::kPlain) y += load(residual + c);
      if constexpr (kind == Residual::kAffine) y += load(residual + c) * residual_scale[c] + residual_shift[c];
      store(out + c, y < floor ? floor : y);
    }
  }
}

struct Arguments {
  Tensor z;
  std::optional<Tensor> residual, sample_factor;
  Tensor scale, shift;
  std::optional<Tensor> residual_scale, residual_shift;
  bool relu, emit_mask;
  Tensor out, mask;
};

// Rows [begin, end) of one sample, in pieces small enough that packing the mask reads them from the first-level cache.
template <class T, Residual kind>
void rows_of_sample(const Arguments& a, const Vectors<acc_t<T>>& v, int64_t begin, int64_t end, int64_t C) {
  using A = acc_t<T>;
  const A floor = a.relu ? A(0) : -std::numeric_limits<A>::infinity();
  const int64_t step = a.emit_mask ? std::max<int64_t>(1, 4096 / C) : end - begin;
  for (int64_t row = begin; row < end; row += step) {
    const int64_t rows = std::min(step, end - row);
    T* out = data<T>(a.out) + row * C;
    const T* residual = kind == Residual::kNone ? nullptr : data<T>(a.residual) + row * C;
    normalise<T, kind>(out, data<T>(a.z) + row * C, residual, v, floor, rows, C);
    if (a.emit_mask) pack_rows(data<uint8_t>(a.mask) + row * mask_bytes(C), out, rows, C);
  }
}

template <class T, Residual kind>
void run(const Arguments& a) {
  using A = acc_t<T>;
  const Shape shape(a.z);
  const int64_t C = shape.channels;
  const Vectors<A> plain{data<A>(a.scale), data<A>(a.shift), data<A>(a.residual_scale), data<A>(a.residual_shift)};
  parallel_rows(shape, [&](int64_t begin, int64_t end) {
    if (!a.sample_factor) return rows_of_sample<T, kind>(a, plain, begin, end, C);
    std::vector<A> scale(C), shift(C);  // times the sample's factor
    Vectors<A> factored = plain;
    factored.scale = scale.data();
    factored.shift = shift.data();
    for_each_sample(shape, begin, end, [&](int64_t sample, int64_t first, int64_t stop) {
      const A factor = data<A>(*a.sample_factor)[sample];
      for (int64_t c = 0; c < C; ++c) {
        scale[c] = factor * plain.scale[c];
        shift[c] = factor * plain.shift[c];
      }
      rows_of_sample<T, kind>(a, factored, first, stop, C);
    });
  });
}

std::tuple<Tensor, Tensor> norm_add_relu(const Tensor& z, const Tensor& scale, const Tensor& shift,
                                         const std::optional<Tensor>& residual,
                                         const std::optional<Tensor>& residual_scale,
                                         const std::optional<Tensor>& residual_shift,
                                         const std::optional<Tensor>& sample_factor, bool relu, bool emit_mask) {
  Arguments a{z, residual, sample_factor, scale, shift, residual_scale, residual_shift, relu, emit_mask, {}, {}};
  check_norm_add_relu(z, scale, shift, residual, residual_scale, residual_shift, sample_factor);
  a.out = empty_channels_last(z);
  a.mask = emit_mask ? empty_mask(z) : empty_vector(0, ScalarType::Byte);
  for_element_type(z.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    if (!residual) return run<T, Residual::kNone>(a);
    residual_scale ? run<T, Residual::kAffine>(a) : run<T, Residual::kPlain>(a);
  });
  return {a.out, a.mask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { m.impl("norm_add_relu", TORCH_BOX(&norm_add_relu)); }

}  // namespace resnet_fused::cpu
