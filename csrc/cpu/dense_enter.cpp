// A dense block's input into the block's buffer, and its batch statistics while each block of rows is in the cache: one
// read, one write.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../checks/dense_enter.h"
#include "alloc.h"
#include "moments.h"

namespace resnet_fused::cpu {
namespace {

RESNET_FUSED_CLONES void copy_rows(float* __restrict out, int64_t pitch, const float* __restrict x, int64_t rows,
                                   int64_t C) {
  for (int64_t m = 0; m < rows; ++m, out += pitch, x += C) {
    for (int64_t c = 0; c < C; ++c) out[c] = x[c];
  }
}

std::tuple<Tensor, Tensor> dense_enter(const Tensor& x, const Tensor& out) {
  check_dense_enter(x, out);
  Tensor mean = empty_stats(x), m2 = empty_stats(x);
  const Shape shape(x);
  const int64_t C = shape.channels, pitch = pixel_pitch(out);
  const float* rows = data<float>(x);
  float* written = data<float>(out);
  moments(
      shape, rows, mean, m2, [&](int64_t c) { return rows[c]; },
      [&](int64_t row, int64_t stop) { copy_rows(written + row * pitch, pitch, rows + row * C, stop - row, C); });
  return {mean, m2};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { m.impl("dense_enter", TORCH_BOX(&dense_enter)); }

}  // namespace resnet_fused::cpu
