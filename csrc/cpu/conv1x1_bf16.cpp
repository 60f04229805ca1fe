// conv1x1 in bfloat16: see conv1x1.cpp, whose tiles, chunks and merge these are. The activation is applied in float32
// and rounded, the products are of vdpbf16ps, and the statistics are of the output as rounded.
#include "conv1x1_bf16.h"

#include <algorithm>
#include <vector>

#include "conv1x1_bf16_values.h"
#include "conv1x1_values.h"
#include "moments.h"

namespace resnet_fused::cpu {

#ifdef RESNET_FUSED_BF16
namespace {

using bf16::kGroup, bf16::kLanes, bf16::kPanel;

struct Problem {
  bf16::Activation input;
  const uint16_t *weight, *packed;  // [K, C], [panels][pairs of C][kPanel][2]
  uint16_t* z;                      // [rows, K]
  int64_t rows, C, K;

  static constexpr int64_t kTile = 4 * kGroup, kBlock = 4 * kTile;  // rows

  int64_t panels() const { return bf16::padded(K) / kPanel; }
  int64_t panel_size() const { return 2 * kPanel * bf16::pairs_of(C); }
};

// Of a block of rows, [K] each up to whole panels: sums of differences to a pivot, and of their squares. The pivot is
// the mean of the block before, and the first row of the chunk's first: what that is off by, the variance has too.
struct BlockSums {
  float *pivot = nullptr, *sum = nullptr, *square = nullptr;
};

// R rows of a panel of the output.
template <int64_t R>
RESNET_FUSED_BF16_GROUP void convolve_group(const Problem& p, const uint16_t* a, int64_t row, int64_t k,
                                            const BlockSums& sums) {
  __m512 products[R][2] = {};
#pragma GCC unroll 16
  for (int64_t r = 0; r < R; ++r) __builtin_prefetch(p.z + (row + r) * p.K + k, 1);
  bf16::multiply<R>(a, bf16::pitch_of(p.C), p.packed + k / kPanel * p.panel_size(), bf16::pairs_of(p.C), products);
  const __mmask32 columns = bf16::columns_of(p.K - k);
  uint16_t* const out = p.z + row * p.K + k;
  if (!sums.sum) {
#pragma GCC unroll 16
    for (int64_t r = 0; r < R; ++r) {
      bf16::store_columns(out + r * p.K, columns, bf16::round_pair(products[r][0], products[r][1]));
    }
    return;
  }
  const __m512 pivot[2] = {_mm512_loadu_ps(sums.pivot + k), _mm512_loadu_ps(sums.pivot + k + kLanes)};
  __m512 sum[2] = {_mm512_loadu_ps(sums.sum + k), _mm512_loadu_ps(sums.sum + k + kLanes)};
  __m512 square[2] = {_mm512_loadu_ps(sums.square + k), _mm512_loadu_ps(sums.square + k + kLanes)};
#pragma GCC unroll 16
  for (int64_t r = 0; r < R; ++r) {
    const __m512i rounded = bf16::round_pair(products[r][0], products[r][1]);
    bf16::store_columns(out + r * p.K, columns, rounded);
    const __m512 low = _mm512_sub_ps(bf16::low_of(rounded), pivot[0]);
    const __m512 high = _mm512_sub_ps(bf16::high_of(rounded), pivot[1]);
    sum[0] = _mm512_add_ps(sum[0], low), sum[1] = _mm512_add_ps(sum[1], high);
    square[0] = _mm512_fmadd_ps(low, low, square[0]), square[1] = _mm512_fmadd_ps(high, high, square[1]);
  }
  _mm512_storeu_ps(sums.sum + k, sum[0]), _mm512_storeu_ps(sums.sum + k + kLanes, sum[1]);
  _mm512_storeu_ps(sums.square + k, square[0]), _mm512_storeu_ps(sums.square + k + kLanes, square[1]);
}

template <int64_t R>
RESNET_FUSED_BF16_INLINE void convolve_group_of(int64_t count, const Problem& p, const uint16_t* a, int64_t row,
                                                int64_t k, const BlockSums& sums) {
  if constexpr (R > 0) {
    if (count == R) return convolve_group<R>(p, a, row, k, sums);
    convolve_group_of<R - 1>(count, p, a, row, k, sums);
  }
}

// Rows [row, row + rows), at most a tile, of all outputs.
RESNET_FUSED_BF16 void convolve_tile(const Problem& p, int64_t row, int64_t rows, uint16_t* scratch,
                                     const BlockSums& sums) {
  bf16::write_activation(p.input, row, rows, scratch);
  const int64_t groups = (rows + kGroup - 1) / kGroup, next = row + rows;
  const int64_t later = p.input.pixels.dense() ? std::min(rows, p.rows - next) : 0;
  bf16::Ahead ahead(p.input.x + next * p.C, later * p.C, groups * p.panels());
  for (int64_t k = 0; k < p.K; k += kPanel) {
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t begin = rows * group / groups, count = rows * (group + 1) / groups - begin;
      ahead();
      convolve_group_of<kGroup>(count, p, scratch + begin * bf16::pitch_of(p.C), row + begin, k, sums);
    }
  }
}

// Statistics by chunk, [chunks, K], about the first row of the output.
struct ChunkSums {
  int64_t chunks;
  std::vector<float> origin;
  std::vector<double> totals, squares;

  static constexpr int64_t kChunks = 64;
  explicit ChunkSums(const Problem& p)
      : chunks(std::clamp((p.rows + Problem::kTile - 1) / Problem::kTile, int64_t(1), kChunks)),
        origin(bf16::padded(p.K)),
        totals(chunks * p.K),
        squares(chunks * p.K) {}

  int64_t first_row(const Problem& p, int64_t chunk) const {
    const int64_t tiles = (p.rows + Problem::kTile - 1) / Problem::kTile;
    return std::min(p.rows, tiles * chunk / chunks * Problem::kTile);
  }
};

// The blocks of a chunk, whose sums are taken if `with_sums`. `found`: three rows of whole panels.
void convolve_chunk(const Problem& p, ChunkSums& all, int64_t chunk, bool with_sums, uint16_t* scratch,
                    std::vector<float>& found) {
  const int64_t width = bf16::padded(p.K), start = all.first_row(p, chunk), stop = all.first_row(p, chunk + 1);
  const BlockSums sums = with_sums ? BlockSums{&found[0], &found[width], &found[2 * width]} : BlockSums{};
  if (with_sums) std::copy(all.origin.begin(), all.origin.end(), found.begin());
  for (int64_t row = start; row < stop; row += Problem::kBlock) {
    const int64_t end = std::min(stop, row + Problem::kBlock);
    if (with_sums) std::fill(found.begin() + width, found.end(), 0.0f);
    for (int64_t tile = row; tile < end; tile += Problem::kTile) {
      convolve_tile(p, tile, std::min(Problem::kTile, end - tile), scratch, sums);
    }
    if (!with_sums) continue;
    merge_block(&all.totals[chunk * p.K], &all.squares[chunk * p.K], row - start, all.origin.data(), sums.pivot,
                sums.sum, sums.square, end - row, p.K);
    const float inverse = 1.0f / static_cast<float>(end - row);
    for (int64_t k = 0; k < p.K; ++k) sums.pivot[k] = finite_or_zero(sums.pivot[k] + sums.sum[k] * inverse);
  }
}

// A first row by itself: what all differences of means are taken from.
void find_origin(const Problem& p, ChunkSums& all, uint16_t* scratch) {
  std::vector<float> zeros(bf16::padded(p.K)), squares(bf16::padded(p.K));
  convolve_tile(p, 0, 1, scratch, {zeros.data(), all.origin.data(), squares.data()});
  for (float& value : all.origin) value = finite_or_zero(value);
}

void run(Problem p, float* mean, float* m2) {
  const auto packed = aligned_array<uint16_t>(p.panels() * p.panel_size() + kPanel);
  const int64_t size = Problem::kTile * bf16::pitch_of(p.C);
  share_units(p.panels(), [&] {
    return [&](int64_t panel) {
      const int64_t k = panel * kPanel;
      bf16::pack_columns(p.weight + k * p.C, std::min(kPanel, p.K - k), p.C, p.C,
                         packed.get() + panel * p.panel_size());
    };
  });
  p.packed = packed.get();
  ChunkSums all(p);
  if (mean) find_origin(p, all, aligned_array<uint16_t>(size).get());
  share_units(all.chunks, [&] {
    return [&, scratch = aligned_array<uint16_t>(size), found = std::vector<float>(3 * bf16::padded(p.K))](
               int64_t chunk) mutable { convolve_chunk(p, all, chunk, mean != nullptr, scratch.get(), found); };
  });
  if (!mean) return;
  for (int64_t chunk = 1; chunk < all.chunks; ++chunk) {
    const int64_t start = all.first_row(p, chunk), rows = all.first_row(p, chunk + 1) - start;
    merge_chunk(all.totals.data(), all.squares.data(), start, &all.totals[chunk * p.K], &all.squares[chunk * p.K], rows,
                p.K);
  }
  for (int64_t k = 0; k < p.K; ++k) {
    mean[k] = static_cast<float>(all.origin[k] + all.totals[k] / static_cast<double>(p.rows));
    m2[k] = static_cast<float>(all.squares[k]);
  }
}

}  // namespace

void convolve1x1_bf16(const Tensor& x, const Tensor& weight, const OptionalTensor& x_scale,
                      const OptionalTensor& x_shift, const std::vector<int64_t>& stride, const Tensor& z, float* mean,
                      float* m2) {
  Problem p{};
  p.input = {data<uint16_t>(x), data<float>(x_scale), data<float>(x_shift), x.size(1), Pixels(x, stride)};
  p.weight = data<uint16_t>(weight), p.z = data<uint16_t>(z);
  p.rows = p.input.pixels.rows, p.C = x.size(1), p.K = weight.size(0);
  run(p, mean, m2);
}
#else
void convolve1x1_bf16(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                      const std::vector<int64_t>&, const Tensor&, float*, float*) {}
#endif

}  // namespace resnet_fused::cpu
