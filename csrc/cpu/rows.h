// A channels_last tensor [N, C, H, W] is the row-major matrix [M, C], M = N*H*W: how its rows are split over threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>

#include "simd.h"

namespace resnet_fused::cpu {

struct Shape {
  int64_t rows, channels, rows_per_sample;

  explicit Shape(const torch::stable::Tensor& x)
      : rows(x.size(0) * x.size(2) * x.size(3)), channels(x.size(1)), rows_per_sample(x.size(2) * x.size(3)) {}
};

// Blocks of rows that stay in the second-level cache and whose sums are safe in float32; consecutive blocks form
// chunks, the units of parallel work. Both depend on the shape alone, so results do not depend on the thread count.
struct Partition {
  static constexpr int64_t kMaxBlockRows = 256, kBlockElements = 65536, kMaxChunks = 128;
  int64_t rows, block_rows, blocks, chunks;

  explicit Partition(const Shape& s)
      : rows(s.rows),
        block_rows(std::clamp(kBlockElements / std::max<int64_t>(s.channels, 1), int64_t(16), kMaxBlockRows)),
        blocks((rows + block_rows - 1) / block_rows),
        chunks(std::clamp(s.rows * s.channels / kBlockElements, int64_t(blocks > 0), std::min(blocks, kMaxChunks))) {}

  int64_t first_row(int64_t chunk) const { return std::min(rows, chunk * blocks / chunks * block_rows); }

  // f(first row, end row) for every block of a chunk, in order
  template <class F>
  void for_each_block(int64_t chunk, const F& f) const {
    for (int64_t row = first_row(chunk), end = first_row(chunk + 1); row < end; row += block_rows) {
      f(row, std::min(end, row + block_rows));
    }
  }
};

// f(first row, end row) on every thread, for loops without reductions.
template <class F>
void parallel_rows(const Shape& s, const F& f) {
  if (s.rows == 0 || s.channels == 0) return;
  torch::stable::parallel_for(0, s.rows, std::max<int64_t>(1, 32768 / s.channels), f);
}

// f(sample, first row, end row) for the pieces of [begin, end) that belong to one sample each.
template <class F>
void for_each_sample(const Shape& s, int64_t begin, int64_t end, const F& f) {
  while (begin < end) {
    const int64_t sample = begin / s.rows_per_sample;
    const int64_t stop = std::min(end, (sample + 1) * s.rows_per_sample);
    f(sample, begin, stop);
    begin = stop;
  }
}

// f(T*) with a null pointer of the element type: float, double, BFloat16 or Half.
template <class F>
void for_element_type(torch::headeronly::ScalarType dtype, const F& f) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Float: return f(static_cast<float*>(nullptr));
    case ScalarType::Double: return f(static_cast<double*>(nullptr));
    case ScalarType::BFloat16: return f(static_cast<BFloat16*>(nullptr));
    default: return f(static_cast<Half*>(nullptr));
  }
}

template <class T>
T* data(const torch::stable::Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <class T>
T* data(const std::optional<torch::stable::Tensor>& t) {
  return t ? data<T>(*t) : nullptr;
}

}  // namespace resnet_fused::cpu
