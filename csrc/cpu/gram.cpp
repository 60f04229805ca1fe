// Shifted Gram matrix and sums: d = x - centre, gram = d' d, total = sum of d, where x is a, or relu(scale*a + shift)
// rounded to the type of a, at the pixels that a stride leaves. One or two reads of those.
//
// The upper triangle is cut into macro tiles of kMacro x kMacro channels and the rows into chunks; a (chunk, macro
// tile) is one unit of work. It packs up to kDepth rows of its channels at a time into panels of one cache line per
// row as d, multiplies kSumRows of them at a time in registers (short float32 sums) and adds those to a float64 tile in
// cache.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "../checks/gram.h"
#include "alloc.h"
#include "panels.h"
#include "pixels.h"
#include "rows.h"

namespace resnet_fused::cpu {
namespace {

constexpr int64_t kRegisterRows = 4;
constexpr int64_t kSumRows = 52;      // of a float32 sum: half the error of kDepth's, which gradients would show
constexpr int64_t kChunkRows = 1536;  // at least; a chunk's tile has to be merged
constexpr int64_t kMaxChunks = 32;
constexpr size_t kMaxScratch = size_t(4) << 20;  // bytes of float64 partial results

template <class T>
struct Input {
  const T* a;                             // [N*H*W, C]
  const acc_t<T>*centre, *scale, *shift;  // [C]; the last two are null where x is a

  Input from(int64_t row, int64_t c, int64_t C) const {
    if (!scale) return {a + row * C + c, centre + c, nullptr, nullptr};
    return {a + row * C + c, centre + c, scale + c, shift + c};
  }
};

// One element of d. A lazy value is rounded to T as if it had been written; NaN and -0.0 pass the ReLU.
template <bool lazy, class T, class A = acc_t<T>>
RESNET_FUSED_INLINE A shifted(const T* a, const A* centre, const A* scale, const A* shift, int64_t i) {
  if constexpr (lazy) {
    const A y = load(a + i) * scale[i] + shift[i];
    T rounded;
    store(&rounded, y < A(0) ? A(0) : y);
    return load(&rounded) - centre[i];
  } else {
    return load(a + i) - centre[i];
  }
}

// packed[panel][row][kPanel] = d[row][channel] of the first `width` channels, 0 beyond; rows of a lie `step` apart.
template <bool lazy, class T, class A = acc_t<T>>
RESNET_FUSED_CLONES void pack(A* __restrict packed, const Input<T>& input, int64_t rows, int64_t width, int64_t step) {
  constexpr int64_t P = kPanel<A>;
  const T* __restrict a = input.a;
  const A* __restrict centre = input.centre, * __restrict scale = input.scale, * __restrict shift = input.shift;
  for (int64_t m = 0; m < rows; ++m, a += step, packed += P) {
    int64_t c = 0;
    for (; c + P <= width; c += P) {
      A* __restrict target = packed + c * kDepth;
      for (int64_t i = 0; i < P; ++i) target[i] = shifted<lazy>(a, centre, scale, shift, c + i);
    }
    if (c < width) {
      A* __restrict target = packed + c * kDepth;
      for (int64_t i = 0; i < P; ++i) target[i] = A(0);
      for (int64_t i = 0; i < width - c; ++i) target[i] = shifted<lazy>(a, centre, scale, shift, c + i);
    }
  }
}

// The pixels [row, row + rows) of the channels [c, c + width)
template <class T, class A = acc_t<T>>
void pack(A* packed, const Input<T>& input, const Pixels& pixels, int64_t row, int64_t rows, int64_t c, int64_t width,
          int64_t C) {
  pixels.for_each_piece(row, row + rows, [&](int64_t first, int64_t count, int64_t from) {
    const Input<T> piece = input.from(from, c, C);
    A* target = packed + (first - row) * kPanel<A>;
    const int64_t step = pixels.step * C;
    piece.scale ? pack<true>(target, piece, count, width, step) : pack<false>(target, piece, count, width, step);
  });
}

// total[c] += sum of the packed rows
template <class A>
RESNET_FUSED_CLONES void add_totals(double* __restrict total, const A* __restrict packed, int64_t rows, int64_t width) {
  constexpr int64_t P = kPanel<A>;
  for (int64_t c = 0; c < width; c += P) {
    const A* panel = packed + c * kDepth;
    double sum[P] = {};
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t i = 0; i < P; ++i) sum[i] += panel[m * P + i];
    }
    for (int64_t i = 0; i < P && c + i < width; ++i) total[c + i] += sum[i];
  }
}

// g += a' b over at most kSumRows packed rows; on the diagonal (a == b) only tiles that reach the upper triangle.
template <class A>
RESNET_FUSED_CLONES void multiply(double* g, const A* a, const A* b, int64_t rows, int64_t a_width, int64_t b_width) {
  constexpr int64_t P = kPanel<A>;
  for (int64_t i = 0; i < a_width; i += P) {
    for (int64_t j = a == b ? i : 0; j < b_width; j += P) {
      for (int64_t r = 0; r < P && i + r < a_width; r += kRegisterRows) {
        multiply_tile<kRegisterRows, P>(g + (i + r) * kMacro + j, a + i * kDepth + r, b + j * kDepth, rows);
      }
    }
  }
}

struct Work {
  int64_t C, macros, tiles, chunks, rows;

  Work(int64_t channels, int64_t pixels) : C(channels), macros((C + kMacro - 1) / kMacro), rows(pixels) {
    tiles = macros * (macros + 1) / 2;
    const int64_t affordable = static_cast<int64_t>(kMaxScratch / sizeof(double)) / std::max<int64_t>(C * C, 1);
    chunks = std::clamp(std::min(affordable, rows / kChunkRows), int64_t(1), kMaxChunks);
  }

  int64_t first_row(int64_t chunk) const { return rows * chunk / chunks; }
};

template <class A>
struct Buffers {
  AlignedArray<A> a = aligned_array<A>(kMacro * kDepth), b = aligned_array<A>(kMacro * kDepth);
  AlignedArray<double> g = aligned_array<double>(kMacro * kMacro);
};

// Adds d' d of rows [begin, end) for channels [i, i + kMacro) x [j, j + kMacro) to g, [C, C] float64.
template <class T, class A = acc_t<T>>
void macro_tile(Buffers<A>& buffers, const Input<T>& input, const Pixels& pixels, double* g, double* total,
                int64_t begin, int64_t end, int64_t i, int64_t j, int64_t C) {
  const int64_t a_width = std::min(kMacro, C - i), b_width = std::min(kMacro, C - j);
  double* tile = buffers.g.get();
  std::fill_n(tile, kMacro * kMacro, 0.0);
  const int64_t blocks = std::max<int64_t>(1, (end - begin + kDepth - 1) / kDepth);
  const int64_t depth = std::max<int64_t>(1, (end - begin + blocks - 1) / blocks);  // equal blocks, no short last one
  for (int64_t row = begin; row < end; row += depth) {
    const int64_t rows = std::min(depth, end - row);
    const A *left = buffers.a.get(), *right = i == j ? left : buffers.b.get();
    pack(buffers.a.get(), input, pixels, row, rows, i, a_width, C);
    if (i == j) add_totals(total + i, left, rows, a_width);
    if (i != j) pack(buffers.b.get(), input, pixels, row, rows, j, b_width, C);
    for (int64_t first = 0; first < rows; first += kSumRows) {
      const int64_t from = first * kPanel<A>;
      multiply(tile, left + from, right + from, std::min(kSumRows, rows - first), a_width, b_width);
    }
  }
  for (int64_t r = 0; r < a_width; ++r) std::copy_n(tile + r * kMacro, b_width, g + (i + r) * C + j);
}

// gram = sum of the chunks' upper triangles, mirrored; in blocks, so that the mirrored writes stay in cache.
template <class A>
void merge_chunks(A* gram, double* grams, int64_t chunks, int64_t C) {
  constexpr int64_t kBlock = 32;
  const int64_t blocks = (C + kBlock - 1) / kBlock;
  const auto merge_block = [&](int64_t first_i, int64_t first_j) {
    for (int64_t i = first_i; i < std::min(C, first_i + kBlock); ++i) {
      for (int64_t j = std::max(i, first_j); j < std::min(C, first_j + kBlock); ++j) {
        double sum = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += grams[(chunk * C + i) * C + j];
        gram[i * C + j] = gram[j * C + i] = static_cast<A>(sum);
      }
    }
  };
  torch::stable::parallel_for(0, blocks, std::max<int64_t>(1, 512 / std::max<int64_t>(C, 1)),
                              [&](auto begin, auto end) {
                                for (int64_t i = begin; i < end; ++i) {
                                  for (int64_t j = i; j < blocks; ++j) merge_block(i * kBlock, j * kBlock);
                                }
                              });
}

template <class T>
void run(const Tensor& a, const Tensor& centre, const OptionalTensor& scale, const OptionalTensor& shift,
         const Pixels& pixels, const Tensor& gram, const Tensor& total) {
  using A = acc_t<T>;
  const Work work(a.size(1), pixels.rows);
  const Input<T> input{data<T>(a), data<A>(centre), data<A>(scale), data<A>(shift)};
  const int64_t C = work.C;
  std::vector<double> totals(work.chunks * C);                        // [chunks, C]
  const auto grams = aligned_array<double>(work.chunks * C * C + 1);  // [chunks, C, C], upper triangle
  torch::stable::parallel_for(0, work.chunks * work.tiles, 1, [&](int64_t begin, int64_t end) {
    Buffers<A> buffers;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t chunk = unit / work.tiles;
      int64_t i = 0, j = unit % work.tiles;  // tile (i, j) of the upper triangle, counted row by row
      for (; j >= work.macros - i; ++i) j -= work.macros - i;
      j += i;
      macro_tile(buffers, input, pixels, grams.get() + chunk * C * C, &totals[chunk * C], work.first_row(chunk),
                 work.first_row(chunk + 1), i * kMacro, j * kMacro, C);
    }
  });
  for (int64_t c = 0; c < C; ++c) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < work.chunks; ++chunk) sum += totals[chunk * C + c];
    data<A>(total)[c] = static_cast<A>(sum);
  }
  merge_chunks(data<A>(gram), grams.get(), work.chunks, C);
}

std::tuple<Tensor, Tensor> gram(const Tensor& a, const Tensor& centre, const OptionalTensor& scale,
                                const OptionalTensor& shift, const std::vector<int64_t>& stride) {
  check_gram(a, centre, scale, shift, stride);
  const int64_t C = a.size(1);
  Tensor g = empty_strided<2>({C, C}, {C, 1}, stat_dtype(a.scalar_type())), total = empty_stats(a);
  const Pixels pixels(a, stride);
  for_element_type(a.scalar_type(), [&](auto* tag) {
    run<std::remove_pointer_t<decltype(tag)>>(a, centre, scale, shift, pixels, g, total);
  });
  return {g, total};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { m.impl("gram", TORCH_BOX(&gram)); }

}  // namespace resnet_fused::cpu
