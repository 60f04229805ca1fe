// See conv1x1_backward.h.
#include "conv1x1_backward.h"

#include <bit>
#include <string_view>

namespace resnet_fused::cpu {
namespace {

struct Stages {
  int64_t panel;
  void (*pack)(const Conv1x1Backward&, int64_t, float*, float*);
  void (*rows)(const Conv1x1Backward&, int64_t, int64_t, int64_t, int64_t, float*, const BackwardSums&);
};

template <class L>
struct At;

#define RESNET_FUSED_STAGES(LEVEL, TARGET)                                                                     \
  template <>                                                                                                  \
  struct At<LEVEL> {                                                                                           \
    TARGET static void pack(const Conv1x1Backward& p, int64_t panel, float* packed, float* coupled) {          \
      pack_inputs<LEVEL>(p, panel, packed, coupled);                                                           \
    }                                                                                                          \
    TARGET static void rows(const Conv1x1Backward& p, int64_t start, int64_t stop, int64_t first, int64_t end, \
                            float* scratch, const BackwardSums& sums) {                                        \
      backward_rows<LEVEL>(p, start, stop, first, end, scratch, sums);                                         \
    }                                                                                                          \
    static constexpr Stages stages{LEVEL::panel, pack, rows};                                                  \
  };

RESNET_FUSED_STAGES(Level512, RESNET_FUSED_TARGET_512)
RESNET_FUSED_STAGES(Level256, RESNET_FUSED_TARGET_256)
RESNET_FUSED_STAGES(Level128, )
#undef RESNET_FUSED_STAGES

const Stages& stages() {
  static const std::string_view level = cpu_level();
  return level == "avx512" ? At<Level512>::stages : level == "avx2" ? At<Level256>::stages : At<Level128>::stages;
}

// How rows and channels are cut. Chunks cost a copy of the weight's gradient each, and blocks of channels another read
// of the gradient: few of both, but enough for the threads of a common machine.
struct Work {
  static constexpr int64_t kChunks = 64, kUnits = 16, kPanels = 4;
  int64_t rows, tile, tiles, chunks, blocks;

  explicit Work(const Conv1x1Backward& p) : rows(p.rows), tile(p.tile()), tiles((p.rows + tile - 1) / tile) {
    const int64_t afforded = p.weight_grad ? p.most_sums / std::max<int64_t>(p.K * p.C, 1) : kChunks;
    const int64_t most = std::clamp(std::min(afforded, tiles), int64_t(1), kChunks);
    chunks = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(most)));
    blocks = p.coupling ? 1 : std::clamp(kUnits / chunks, int64_t(1), std::max(p.panels / kPanels, int64_t(1)));
  }

  int64_t first_row(int64_t chunk) const { return std::min(rows, tiles * chunk / chunks * tile); }
};

// The sums of all chunks.
struct ChunkSums {
  int64_t weights;  // of a chunk
  AlignedArray<float> weight;
  std::vector<double> sum_g, sum_gx, sum_dz;  // [chunks, C], [chunks, C], [chunks, K]

  ChunkSums(const Conv1x1Backward& p, const Work& work)
      : weights(p.weight_grad ? p.panels * p.K * p.panel : 0), weight(aligned_array<float>(work.chunks * weights + 1)) {
    if (p.through) sum_g.resize(work.chunks * p.C), sum_gx.resize(work.chunks * p.C);
    if (p.sum_dz) sum_dz.resize(work.chunks * p.K);
  }

  BackwardSums of(const Conv1x1Backward& p, int64_t chunk, bool first_block) {
    BackwardSums sums{weight.get() + chunk * weights};
    if (p.through) sums.sum_g = &sum_g[chunk * p.C], sums.sum_gx = &sum_gx[chunk * p.C];
    if (p.sum_dz && first_block) sums.sum_dz = &sum_dz[chunk * p.K];
    return sums;
  }
};

void merge_weights(const Conv1x1Backward& p, const Work& work, const ChunkSums& sums, float* grad_weight) {
  torch::stable::parallel_for(0, p.panels * p.K, 256, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {  // of a panel
      const int64_t c = line / p.K * p.panel, k = line % p.K, columns = std::min(p.panel, p.C - c);
      float* out = grad_weight + k * p.C + c;
      const float* from = sums.weight.get() + line * p.panel;
      std::copy_n(from, columns, out);
      for (int64_t chunk = 1; chunk < work.chunks; ++chunk) {
        for (int64_t j = 0; j < columns; ++j) out[j] += from[chunk * sums.weights + j];
      }
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

// Larger than what a next reader could find in the caches. Of whole lines.
bool streams(const Conv1x1Backward& p) {
  constexpr int64_t kLarge = int64_t(6) << 20;  // floats
  return p.panel == Level512::panel && p.grad_x && p.gap == 0 && p.rows * p.C >= kLarge && p.C % 16 == 0 &&
         reinterpret_cast<uintptr_t>(p.grad_x) % 64 == 0;
}

}  // namespace

void run_backward(Conv1x1Backward p, const BackwardResults& results) {
  const Stages& at = stages();
  p.panel = at.panel, p.panels = (p.C + at.panel - 1) / at.panel;
  const auto packed = aligned_array<float>(p.weight ? p.panels * p.K * p.panel + 1 : 1);
  const auto coupled = aligned_array<float>(p.coupling ? p.panels * p.C * p.panel + 1 : 1);
  if (p.grad_x && (p.weight || p.coupling)) {
    share_units(p.panels, [&] {
      return [&](int64_t panel) {
        at.pack(p, panel, packed.get() + panel * p.K * p.panel, coupled.get() + panel * p.C * p.panel);
      };
    });
  }
  p.packed = p.weight ? packed.get() : nullptr, p.coupled = coupled.get();
  p.stream = streams(p);
  const Work work(p);
  ChunkSums sums(p, work);
  if (p.rows == 0) std::fill_n(sums.weight.get(), sums.weights, 0.0f);
  share_units(p.rows ? work.chunks * work.blocks : 0, [&] {
    return [&, scratch = aligned_array<float>(p.scratch())](int64_t unit) {
      const int64_t chunk = unit / work.blocks, block = unit % work.blocks;
      const int64_t first = p.panels * block / work.blocks, end = p.panels * (block + 1) / work.blocks;
      const int64_t start = work.first_row(chunk), stop = work.first_row(chunk + 1);
      at.rows(p, start, stop, first, end, scratch.get(), sums.of(p, chunk, block == 0));
    };
  });
  if (results.grad_weight) merge_weights(p, work, sums, results.grad_weight);
  merge_vector(sums.sum_g, p.C, results.sum_g), merge_vector(sums.sum_gx, p.C, results.sum_gx);
  merge_vector(sums.sum_dz, p.K, results.sum_dz);
}

}  // namespace resnet_fused::cpu
