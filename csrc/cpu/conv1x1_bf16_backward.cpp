// The backward of a 1x1 convolution in bfloat16, cut into units of work as conv1x1_backward.cpp cuts that in float32:
// chunks of rows, which depend on the shape alone, and are added up in their order.
#include <algorithm>
#include <bit>
#include <vector>

#include "conv1x1_bf16.h"
#include "conv1x1_bf16_backward_stages.h"
#include "conv1x1_values.h"

namespace resnet_fused::cpu {

#ifdef RESNET_FUSED_BF16
namespace {

using bf16::kPanel;

// Chunks cost a copy of the weight's gradient each, and blocks of channels another read of the gradient: few of both,
// but enough for the threads of a common machine.
struct Work {
  static constexpr int64_t kSums = int64_t(1) << 20, kChunks = 64, kUnits = 8, kPanels = 4;
  int64_t rows, tile, tiles, chunks, blocks;

  explicit Work(const bf16::Backward& p) : rows(p.rows), tile(p.tile()), tiles((p.rows + tile - 1) / tile) {
    const int64_t afforded = p.weight_grad ? kSums / std::max<int64_t>(p.K * p.C, 1) : kChunks;
    const int64_t most = std::clamp(std::min(afforded, tiles), int64_t(1), kChunks);
    chunks = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(most)));
    blocks = std::clamp(kUnits / chunks, int64_t(1), std::max(p.panels() / kPanels, int64_t(1)));
  }

  int64_t first_row(int64_t chunk) const { return std::min(rows, tiles * chunk / chunks * tile); }
};

// The sums of all chunks, and where a unit sums a tile's.
struct ChunkSums {
  int64_t weights;  // of a chunk
  AlignedArray<float> weight;
  std::vector<double> sum_g, sum_gx, sum_dz;  // [chunks, C], [chunks, C], [chunks, K]

  ChunkSums(const bf16::Backward& p, const Work& work)
      : weights(p.weight_grad ? p.panels() * p.K * kPanel : 0),
        weight(aligned_array<float>(work.chunks * weights + 1)) {
    if (p.through) sum_g.resize(work.chunks * p.C), sum_gx.resize(work.chunks * p.C);
    if (p.sum_dz) sum_dz.resize(work.chunks * p.K);
  }
};

void take_in(const float* tile, int64_t begin, int64_t end, double* sums) {
  for (int64_t i = begin; i < end; ++i) sums[i] += tile[i];
}

// The rows of a chunk for a block of the channels' panels. `tile`: room for sums of a tile.
void run_unit(const bf16::Backward& p, const Work& work, ChunkSums& all, int64_t chunk, int64_t block,
              uint16_t* scratch, std::vector<float>& tile) {
  const int64_t first = p.panels() * block / work.blocks, end = p.panels() * (block + 1) / work.blocks;
  const int64_t C = bf16::padded(p.C), last = std::min(p.C, end * kPanel);
  const int64_t start = work.first_row(chunk), stop = work.first_row(chunk + 1);
  const bool sums_dz = p.sum_dz && block == 0;
  bf16::Sums sums{all.weight.get() + chunk * all.weights};
  if (p.through) sums.sum_g = &tile[0], sums.sum_gx = &tile[C];
  if (sums_dz) sums.sum_dz = &tile[2 * C];
  for (int64_t row = start; row < stop; row += work.tile) {
    if (p.through || sums_dz) std::fill(tile.begin(), tile.end(), 0.0f);
    bf16::backward_tile(p, row, std::min(work.tile, stop - row), first, end, row > start, scratch, sums);
    if (p.through) {
      take_in(sums.sum_g, first * kPanel, last, &all.sum_g[chunk * p.C]);
      take_in(sums.sum_gx, first * kPanel, last, &all.sum_gx[chunk * p.C]);
    }
    if (sums_dz) take_in(sums.sum_dz, 0, p.K, &all.sum_dz[chunk * p.K]);
  }
}

// Of the weight's gradient line by line of a panel: the sum of the chunks, rounded where `rounded` is to have it.
void merge_weights(const bf16::Backward& p, const Work& work, const ChunkSums& sums, float* exact, BFloat16* rounded) {
  torch::stable::parallel_for(0, p.panels() * p.K, 256, [&](int64_t begin, int64_t end) {
    float total[kPanel];
    for (int64_t line = begin; line < end; ++line) {
      const int64_t c = line / p.K * kPanel, at = line % p.K * p.C + c, columns = std::min(kPanel, p.C - c);
      const float* from = sums.weight.get() + line * kPanel;
      std::copy_n(from, kPanel, total);
      for (int64_t chunk = 1; chunk < work.chunks; ++chunk) {
        for (int64_t j = 0; j < kPanel; ++j) total[j] += from[chunk * sums.weights + j];
      }
      if (exact) std::copy_n(total, columns, exact + at);
      for (int64_t j = 0; rounded && j < columns; ++j) store(rounded + at + j, total[j]);
    }
  });
}

void merge_vector(const std::vector<double>& sums, int64_t size, float* out) {
  for (int64_t i = 0; out && i < size; ++i) {
    double sum = 0;
    for (size_t at = i; at < sums.size(); at += size) sum += sums[at];
    out[i] = static_cast<float>(sum);
  }
}

struct Packed {
  AlignedArray<uint16_t> weight, coupling;

  explicit Packed(const bf16::Backward& p)
      : weight(aligned_array<uint16_t>(p.weight ? p.panels() * size_of(p.K) + kPanel : 1)),
        coupling(aligned_array<uint16_t>(p.coupling ? p.panels() * size_of(p.C) + kPanel : 1)) {
    if (!p.grad_x || !(p.weight || p.coupling)) return;
    share_units(p.panels(), [&] {
      return [&](int64_t panel) {
        const int64_t c = panel * kPanel, columns = std::min(kPanel, p.C - c);
        if (p.weight) bf16::pack_rows(p.weight + c, columns, p.K, p.C, weight.get() + panel * size_of(p.K));
        if (p.coupling) bf16::pack_rows(p.coupling + c, columns, p.C, p.C, coupling.get() + panel * size_of(p.C));
      };
    });
  }

  static int64_t size_of(int64_t depth) { return 2 * kPanel * bf16::pairs_of(depth); }
};

// `ones`: filled where a is absent.
bf16::Gradient gradient_of(const Conv1x1GradientArguments& t, std::vector<float>& ones) {
  const Tensor& g = t.g;
  if (!t.a) ones.assign(g.size(1), 1.0f);
  return {data<uint16_t>(g),
          data<uint16_t>(t.z),
          t.a ? data<float>(t.a) : ones.data(),
          data<float>(t.b),
          data<float>(t.d),
          data<float>(t.scale),
          data<float>(t.shift),
          data<float>(t.sample_factor),
          data<uint8_t>(t.mask),
          g.size(1),
          g.size(2) * g.size(3)};
}

void run(bf16::Backward p, const Conv1x1GradientResults& results) {
  const Packed packed(p);
  p.packed = p.weight ? packed.weight.get() : nullptr, p.coupled = packed.coupling.get();
  const Work work(p);
  ChunkSums sums(p, work);
  if (p.rows == 0) std::fill_n(sums.weight.get(), sums.weights, 0.0f);
  share_units(p.rows ? work.chunks * work.blocks : 0, [&] {
    return [&, scratch = aligned_array<uint16_t>(p.scratch()),
            tile = std::vector<float>(2 * bf16::padded(p.C) + bf16::padded(p.K))](int64_t unit) mutable {
      run_unit(p, work, sums, unit / work.blocks, unit % work.blocks, scratch.get(), tile);
    };
  });
  if (p.weight_grad) {
    BFloat16* const rounded = results.rounded_weight ? data<BFloat16>(*results.rounded_weight) : nullptr;
    merge_weights(p, work, sums, results.grad_weight ? data<float>(*results.grad_weight) : nullptr, rounded);
  }
  merge_vector(sums.sum_g, p.C, results.sum_g), merge_vector(sums.sum_gx, p.C, results.sum_gx);
  merge_vector(sums.sum_dz, p.K, results.sum_dz);
}

}  // namespace

void dgrad1x1_bf16(const Conv1x1GradientArguments& gradient, const Conv1x1InputArguments& t,
                   const Conv1x1GradientResults& results) {
  const Tensor& g = gradient.g;
  const int64_t H = g.size(2), W = g.size(3), C = t.weight ? t.weight->size(1) : g.size(1);
  std::vector<float> ones;
  bf16::Backward p{};
  p.gradient = gradient_of(gradient, ones);
  const Pixels pixels(t.x ? *t.x : g, t.x ? t.x_stride : std::vector<int64_t>{1, 1});
  p.input = {data<uint16_t>(t.x), data<float>(t.x_scale), data<float>(t.x_shift), C, pixels};
  p.weight = data<uint16_t>(t.weight), p.coupling = data<uint16_t>(t.coupling);
  p.constant = data<float>(t.constant), p.mean = data<float>(t.x_mean);
  p.added = {data<uint16_t>(t.residual), data<uint8_t>(t.residual_mask), H, W, t.residual_stride[0],
             t.residual_stride[1]};
  p.grad_x = data<uint16_t>(*results.grad_x), p.through = t.x_scale.has_value();
  p.weight_grad = results.rounded_weight != nullptr;
  p.rows = g.size(0) * H * W, p.K = g.size(1), p.C = C;
  run(p, results);
}

void wgrad1x1_bf16(const Conv1x1GradientArguments& gradient, const Tensor& x, const OptionalTensor& x_scale,
                   const OptionalTensor& x_shift, const std::vector<int64_t>& stride,
                   const Conv1x1GradientResults& results) {
  const Tensor& g = gradient.g;
  std::vector<float> ones;
  bf16::Backward p{};
  p.gradient = gradient_of(gradient, ones);
  p.input = {data<uint16_t>(x), data<float>(x_scale), data<float>(x_shift), x.size(1), Pixels(x, stride)};
  p.weight_grad = p.sum_dz = true;
  p.rows = g.size(0) * g.size(2) * g.size(3), p.K = g.size(1), p.C = x.size(1);
  run(p, results);
}
#else
void dgrad1x1_bf16(const Conv1x1GradientArguments&, const Conv1x1InputArguments&, const Conv1x1GradientResults&) {}
void wgrad1x1_bf16(const Conv1x1GradientArguments&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                   const std::vector<int64_t>&, const Conv1x1GradientResults&) {}
#endif

}  // namespace resnet_fused::cpu
