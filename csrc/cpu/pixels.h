// The pixels that a strided 1x1 convolution reads, as rows.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "simd.h"

namespace resnet_fused::cpu {

// The pixels [::stride, ::stride] of images, as rows that are counted through.
struct Pixels {
  int64_t H, W, height, width, stride_h, step, rows;  // height and width are of what is left, step is between columns

  Pixels() = default;
  Pixels(const torch::stable::Tensor& a, const std::vector<int64_t>& stride)
      : H(a.size(2)),
        W(a.size(3)),
        height((H + stride[0] - 1) / stride[0]),
        width((W + stride[1] - 1) / stride[1]),
        stride_h(stride[0]),
        step(stride[1]),
        rows(a.size(0) * height * width) {}

  bool dense() const { return stride_h == 1 && step == 1; }

  // The row of a in which the row-th of them lies.
  RESNET_FUSED_INLINE int64_t source(int64_t row) const {
    if (dense()) return row;
    const int64_t line = row / width, w = row - line * width;
    return (line / height * H + line % height * stride_h) * W + w * step;
  }

  // f(first of them, how many, row of a that the first lies in): pieces of [begin, end) whose rows lie `step` apart
  template <class F>
  void for_each_piece(int64_t begin, int64_t end, const F& f) const {
    if (dense()) return f(begin, end - begin, begin);
    for (int64_t row = begin; row < end;) {
      const int64_t line = row / width, w = row - line * width, count = std::min(end - row, width - w);
      f(row, count, (line / height * H + line % height * stride_h) * W + w * step);
      row += count;
    }
  }
};

}  // namespace resnet_fused::cpu
