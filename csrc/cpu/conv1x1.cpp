// A 1x1 convolution that applies its input on load and sums the statistics of its output: one read, one write.
//
// Tiles of rows pass by panels of the packed weight. A chunk of tiles, whose statistics are merged in float64 in the
// tiles' order, depends on the shape alone, and so does every sum, whatever the number of threads.
// Bytes: the pixels of x, weight and z once; FLOPs 2*M*K*C.
#include <torch/csrc/stable/library.h>

#include <string_view>
#include <tuple>
#include <vector>

#include "../checks/conv1x1.h"
#include "affine.h"
#include "alloc.h"
#include "conv1x1_forward.h"
#include "moments.h"

namespace resnet_fused::cpu {
namespace {

struct Stages {
  int64_t panel;
  void (*pack)(const Conv1x1&, int64_t, float*);
  void (*tile)(const Conv1x1&, int64_t, int64_t, int64_t, int64_t, float*, const BlockSums&);
};

template <class L>
struct At;

#define RESNET_FUSED_STAGES(LEVEL, TARGET)                                                                             \
  template <>                                                                                                          \
  struct At<LEVEL> {                                                                                                   \
    TARGET static void pack(const Conv1x1& p, int64_t panel, float* packed) { pack_outputs<LEVEL>(p, panel, packed); } \
    TARGET static void tile(const Conv1x1& p, int64_t row, int64_t rows, int64_t first, int64_t end, float* scratch,   \
                            const BlockSums& sums) {                                                                   \
      convolve_tile<LEVEL>(p, row, rows, first, end, scratch, sums);                                                   \
    }                                                                                                                  \
    static constexpr Stages stages{LEVEL::panel, pack, tile};                                                          \
  };

RESNET_FUSED_STAGES(Level512, RESNET_FUSED_TARGET_512)
RESNET_FUSED_STAGES(Level256, RESNET_FUSED_TARGET_256)
RESNET_FUSED_STAGES(Level128, )
#undef RESNET_FUSED_STAGES

const Stages& stages() {
  static const std::string_view level = cpu_level();
  return level == "avx512" ? At<Level512>::stages : level == "avx2" ? At<Level256>::stages : At<Level128>::stages;
}

// How the rows and the panels are cut into units of work.
struct Work {
  static constexpr int64_t kChunks = 64, kUnits = 16, kPanels = 4;  // at most; if it can be had; of a unit at least
  int64_t rows, tiles, chunks, parts;

  explicit Work(const Conv1x1& p)
      : rows(p.rows),
        tiles((p.rows + Conv1x1::kTile - 1) / Conv1x1::kTile),
        chunks(std::clamp(tiles, int64_t(1), kChunks)),
        parts(std::clamp(kUnits / chunks, int64_t(1), std::max(p.panels / kPanels, int64_t(1)))) {}

  int64_t first_row(int64_t chunk) const { return std::min(rows, tiles * chunk / chunks * Conv1x1::kTile); }
};

// Statistics by chunk, [chunks, K], about the first row of the output.
struct ChunkSums {
  std::vector<float> origin;
  std::vector<double> totals, squares;
};

// The pivots for the next block: the means of this one.
void move_pivots(const BlockSums& sums, int64_t rows, int64_t k, int64_t columns) {
  const float inverse = 1.0f / static_cast<float>(rows);
  for (int64_t i = k; i < k + columns; ++i) sums.pivot[i] = finite_or_zero(sums.pivot[i] + sums.sum[i] * inverse);
}

void run(const Conv1x1& p, const Stages& at, const Work& work, ChunkSums* sums) {
  const int64_t padded = p.panels * p.panel;
  share_units(work.chunks * work.parts, [&] {
    return
        [&, scratch = aligned_array<float>(p.scratch()), found = std::vector<float>(3 * padded)](int64_t unit) mutable {
          const int64_t chunk = unit / work.parts, part = unit % work.parts;
          const int64_t first = p.panels * part / work.parts, end = p.panels * (part + 1) / work.parts;
          const int64_t k = first * p.panel, columns = std::min(p.K, end * p.panel) - k;
          const int64_t start = work.first_row(chunk), stop = work.first_row(chunk + 1);
          BlockSums block;
          if (sums) block = {&found[0], &found[padded], &found[2 * padded]};
          for (int64_t row = start; row < stop; row += Conv1x1::kBlock) {
            const int64_t block_end = std::min(stop, row + Conv1x1::kBlock);
            for (int64_t tile = row; tile < block_end; tile += Conv1x1::kTile) {
              block.without_pivot = tile == start, block.first_tile = tile == row;
              at.tile(p, tile, std::min(Conv1x1::kTile, block_end - tile), first, end, scratch.get(), block);
            }
            if (!sums) continue;
            merge_block(&sums->totals[chunk * p.K + k], &sums->squares[chunk * p.K + k], row - start, &sums->origin[k],
                        block.pivot + k, block.sum + k, block.square + k, block_end - row, columns);
            move_pivots(block, block_end - row, k, columns);
          }
        };
  });
}

void merge(const Conv1x1& p, const Work& work, ChunkSums& sums, const Tensor& mean, const Tensor& m2) {
  for (int64_t chunk = 1; chunk < work.chunks; ++chunk) {
    const int64_t start = work.first_row(chunk), rows = work.first_row(chunk + 1) - start;
    merge_chunk(sums.totals.data(), sums.squares.data(), start, &sums.totals[chunk * p.K], &sums.squares[chunk * p.K],
                rows, p.K);
  }
  for (int64_t k = 0; k < p.K; ++k) {
    data<float>(mean)[k] = static_cast<float>(sums.origin[k] + sums.totals[k] / static_cast<double>(p.rows));
    data<float>(m2)[k] = static_cast<float>(sums.squares[k]);
  }
}

}  // namespace

void run_forward(Conv1x1 p, const Tensor& mean, const Tensor& m2) {
  const Stages& at = stages();
  p.panel = at.panel, p.panels = (p.K + at.panel - 1) / at.panel;
  const bool wanted = mean.numel() > 0;
  if (p.rows == 0) {
    for (const Tensor* t : {&mean, &m2}) std::fill_n(data<float>(*t), t->numel(), 0.0f);
  }
  if (p.rows == 0 || p.K == 0) return;
  const Work work(p);
  ChunkSums sums;
  const auto packed = aligned_array<float>(p.panels * p.C * p.panel + 1);
  share_units(p.panels,
              [&] { return [&](int64_t panel) { at.pack(p, panel, packed.get() + panel * p.C * p.panel); }; });
  p.packed = packed.get();
  if (wanted) {
    // A first row by itself: what all differences of means are taken from.
    sums.origin.resize(p.panels * p.panel);
    sums.totals.resize(work.chunks * p.K), sums.squares.resize(work.chunks * p.K);
    std::vector<float> others(p.panels * p.panel);
    const auto scratch = aligned_array<float>(p.scratch());
    at.tile(p, 0, 1, 0, p.panels, scratch.get(), {sums.origin.data(), &others[0], &others[0], true, true});
  }
  run(p, at, work, wanted ? &sums : nullptr);
  if (wanted) merge(p, work, sums, mean, m2);
}

namespace {

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Results conv1x1(const Tensor& x, const Tensor& weight, const OptionalTensor& x_scale, const OptionalTensor& x_shift,
                const std::vector<int64_t>& stride, bool emit_stats, const OptionalTensor& gamma,
                const OptionalTensor& beta, std::optional<double> eps) {
  check_conv1x1(x, weight, x_scale, x_shift, stride, gamma, beta, eps);
  const Pixels pixels(x, stride);
  const int64_t K = weight.size(0), C = x.size(1);
  Tensor z = empty_images(x.size(0), K, pixels.height, pixels.width, ScalarType::Float);
  Tensor mean = empty_vector(emit_stats ? K : 0, ScalarType::Float), m2 = empty_vector(mean.numel(), ScalarType::Float);
  Conv1x1 p{};
  p.input = {data<float>(x), data<float>(x_scale), data<float>(x_shift), C, pixels};
  p.weight = data<float>(weight), p.z = data<float>(z);
  p.rows = pixels.rows, p.C = C, p.K = K;
  run_forward(p, mean, m2);
  return std::tuple_cat(std::make_tuple(z), statistics(mean, m2, gamma, beta, z, emit_stats ? eps : std::nullopt));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { m.impl("conv1x1", TORCH_BOX(&conv1x1)); }

}  // namespace resnet_fused::cpu
