// Tiles of rows pass by a part of the weight, packed into the second-level cache by the thread that multiplies by it.
//
// A block of rows passes all parts before the next begins, so that what is read of x again is near. Each thread takes
// as many of the pairs of part and tile as any other. No result depends on how many: an output is a sum over channels
// in their order.
#include "conv_pointwise.h"

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <string_view>

#include "conv_pointwise_stages.h"

namespace resnet_fused::cpu {
namespace {

struct Stages {
  int64_t panel;
  void (*pack)(const Pointwise&, int64_t, float*);
  void (*tile)(const Pointwise&, const Tile&, int64_t, const float*, Later&);
};

template <class L>
struct At;

#define RESNET_FUSED_STAGES(LEVEL, TARGET)                                                                   \
  template <>                                                                                                \
  struct At<LEVEL> {                                                                                         \
    TARGET static void pack(const Pointwise& p, int64_t panel, float* packed) {                              \
      pack_pointwise<LEVEL>(p, panel, packed);                                                               \
    }                                                                                                        \
    TARGET static void tile(const Pointwise& p, const Tile& tile, int64_t panel, const float* packed,        \
                            Later& later) {                                                                  \
      multiply_tile<LEVEL>(p, tile, panel, packed, later);                                                   \
    }                                                                                                        \
    static constexpr Stages stages{LEVEL::panel, pack, tile};                                                \
  };

RESNET_FUSED_STAGES(Level512, RESNET_FUSED_TARGET_512)
RESNET_FUSED_STAGES(Level256, RESNET_FUSED_TARGET_256)
RESNET_FUSED_STAGES(Level128, )
#undef RESNET_FUSED_STAGES

const Stages& stages() {
  static const std::string_view level = cpu_level();
  return level == "avx512" ? At<Level512>::stages : level == "avx2" ? At<Level256>::stages : At<Level128>::stages;
}

int64_t env(const char* n, int64_t d) { const char* s = getenv(n); return s ? atoll(s) : d; }

// How rows and panels are cut: tiles within a line of the image where a stride leaves gaps, blocks of tiles, parts of
// panels.
struct Work {
  const int64_t kTile = 28, kBlock = env("BLOCK", 28), kPart = env("PART", 256) << 8;  // rows; tiles; floats
  int64_t lines, width, pieces, tiles, panels, packed, part, parts;

  Work(const Pointwise& p, int64_t panel)
      : lines(p.pixels.dense() ? 1 : p.pixels.rows / p.pixels.width),
        width(p.pixels.rows / lines),
        pieces((width + kTile - 1) / kTile),
        tiles(lines * pieces),
        panels((p.K + panel - 1) / panel),
        packed((p.C + 2) * panel),
        part(std::clamp(kPart / packed, int64_t(1), panels)),
        parts((panels + part - 1) / part) {
    part = (panels + parts - 1) / parts;
  }

  int64_t units() const { return tiles * parts; }
  int64_t blocks() const { return (tiles + kBlock - 1) / kBlock; }

  Tile tile(const Pointwise& p, int64_t index) const {
    const int64_t line = index / pieces, begin = index % pieces * kTile, row = line * width + begin;
    const float* x = p.x + p.pixels.source(row) * p.C;
    const int64_t rows = std::min(kTile, width - begin);
    return {row, rows, x, p.pixels.dense() ? x + rows * p.C : nullptr};
  }
};

float* kept_scratch(int64_t size) {
  thread_local AlignedArray<float> kept;
  thread_local int64_t there = 0;
  if (there < size) kept = aligned_array<float>(size), there = size;
  return kept.get();
}

}  // namespace

void run_pointwise(const Pointwise& p) {
  const Stages& at = stages();
  const Work w(p, at.panel);
  torch::stable::parallel_for(0, w.units(), 1, [&](int64_t first, int64_t last) {
    float* packed = kept_scratch(w.part * w.packed);
    int64_t there = -1;
    for (int64_t unit = first; unit < last;) {
      const int64_t block = unit / (w.kBlock * w.parts), begin = block * w.kBlock;
      const int64_t tiles = std::min(w.kBlock, w.tiles - begin), within = unit - begin * w.parts;
      const int64_t part = within / tiles, tile = within % tiles, end = std::min(tiles, tile + last - unit);
      const int64_t panel = part * w.part, panels = std::min(w.part, w.panels - panel);
      if (there != part) {
        for (int64_t i = 0; i < panels; ++i) at.pack(p, panel + i, packed + i * w.packed);
        there = part;
      }
      unit += end - tile;
      Later later{nullptr, packed, packed};
      for (int64_t t = tile; t < end; ++t) {
        if (t == std::max(tile, end - 2) && unit < last && w.parts > 1) {
          const int64_t next = panel + panels < w.panels ? (panel + panels) * at.panel : 0;
          later.weight = p.weight + next * p.C;
          later.weight_end = p.weight + std::min(p.K, next + w.part * at.panel) * p.C;
        }
        const Tile own = w.tile(p, begin + t);
        for (int64_t i = 0; i < panels; ++i) at.tile(p, own, panel + i, packed + i * w.packed, later);
      }
    }
  });
}

}  // namespace resnet_fused::cpu
