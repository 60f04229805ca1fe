// Tiles of rows pass by a part of the weight, packed into the second-level cache by the thread that multiplies by it.
//
// A block of rows passes all parts before the next begins, so that what is read of x again is near. Each thread takes
// as many of the pairs of part and tile as any other. No result depends on how many: an output is a sum over channels
// in their order.
#include "conv_pointwise.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <string_view>

#include "conv_pointwise_stages.h"

namespace resnet_fused::cpu {
namespace {

constexpr int64_t kTile = 30;  // rows of a tile, at most: some groups of product.h's

struct Stages {
  int64_t panel, rows;  // of a panel: columns; of a tile
  bool fetches;         // the rows of the next tile by every panel; else by the last of a part
  void (*pack)(const Pointwise&, int64_t, float*);
  void (*tile)(const Pointwise&, const Tile&, int64_t, const float*, Later&);
};

template <class L>
struct At;

#define RESNET_FUSED_STAGES(LEVEL, TARGET)                                                                            \
  template <>                                                                                                         \
  struct At<LEVEL> {                                                                                                  \
    TARGET static void pack(const Pointwise& p, int64_t panel, float* packed) {                                       \
      pack_pointwise<LEVEL>(p, panel, packed);                                                                        \
    }                                                                                                                 \
    TARGET static void tile(const Pointwise& p, const Tile& tile, int64_t panel, const float* packed, Later& later) { \
      multiply_tile<LEVEL>(p, tile, panel, packed, later);                                                            \
    }                                                                                                                 \
    static constexpr Stages stages{LEVEL::panel, kTile / LEVEL::rows * LEVEL::rows, LEVEL::fetches, pack, tile};      \
  };

RESNET_FUSED_STAGES(Level512, RESNET_FUSED_TARGET_512)
RESNET_FUSED_STAGES(Level256, RESNET_FUSED_TARGET_256)
RESNET_FUSED_STAGES(Level128, )
#undef RESNET_FUSED_STAGES

const Stages& stages() {
  static const std::string_view level = cpu_level();
  return level == "avx512" ? At<Level512>::stages : level == "avx2" ? At<Level256>::stages : At<Level128>::stages;
}

// How the work is cut: into tiles of rows, within a line of the image where a stride leaves gaps; blocks of tiles;
// parts of the weight's panels. A unit is a tile by a part; units come by blocks, then by parts.
struct Work {
  static constexpr int64_t kBlock = 28, kPart = 32 << 10;  // tiles; floats of a part
  int64_t panel, rows, lines, width, pieces, tiles, panels, packed, part, parts;

  Work(const Pointwise& p, const Stages& at)
      : panel(at.panel),
        rows(at.rows),
        lines(p.pixels.dense() ? 1 : p.pixels.rows / p.pixels.width),
        width(p.pixels.rows / lines),
        pieces((width + rows - 1) / rows),
        tiles(lines * pieces),
        panels((p.K + panel - 1) / panel),
        packed((p.C + 2) * panel),
        part(std::clamp(kPart / packed, int64_t(1), panels)),
        parts((panels + part - 1) / part) {
    part = (panels + parts - 1) / parts;
  }

  Tile tile(const Pointwise& p, int64_t index) const {
    const int64_t line = index / pieces, begin = index % pieces * rows, row = line * width + begin;
    const int64_t count = std::min(rows, width - begin);
    const float* x = p.x + p.pixels.source(row) * p.C;
    return {row, count, x, p.pixels.dense() ? x + count * p.C : nullptr};
  }
};

// Memory of this thread, which it keeps.
float* scratch_of(int64_t size) {
  thread_local AlignedArray<float> kept;
  thread_local int64_t there = 0;
  if (there < size) kept = aligned_array<float>(size), there = size;
  return kept.get();
}

// The panels of a part, packed, and those of the part after it.
class Part {
  const Pointwise& p;
  const Work& w;
  float* const packed;
  int64_t there = -1;

 public:
  Part(const Pointwise& pointwise, const Work& work)
      : p(pointwise), w(work), packed(scratch_of(work.part * work.packed)) {}

  int64_t first(int64_t part) const { return std::min(w.panels, part * w.part); }

  const float* at(int64_t part, int64_t panel) const { return packed + (panel - first(part)) * w.packed; }

  void pack(const Stages& at, int64_t part) {
    if (there == part) return;
    for (int64_t panel = first(part); panel < first(part + 1); ++panel) {
      at.pack(p, panel, packed + (panel - first(part)) * w.packed);
    }
    there = part;
  }

  // What is packed next of the weight: nothing where that is known to be near already.
  Later later(int64_t part) const {
    if (w.parts == 1) return {};
    const int64_t next = (part + 1) % w.parts, end = std::min(p.K, first(next + 1) * w.panel);
    return {nullptr, p.weight + first(next) * w.panel * p.C, p.weight + end * p.C};
  }
};

void multiply_units(const Pointwise& p, const Stages& at, const Work& w, int64_t first, int64_t last) {
  constexpr int64_t kBefore = 2;  // tiles before the next part, whose weight they fetch
  Part own(p, w);
  for (int64_t unit = first; unit < last;) {
    const int64_t begin = unit / (Work::kBlock * w.parts) * Work::kBlock, within = unit - begin * w.parts;
    const int64_t tiles = std::min(Work::kBlock, w.tiles - begin), part = within / tiles, tile = within % tiles;
    const int64_t end = std::min(tiles, tile + last - unit);
    own.pack(at, part);
    unit += end - tile;
    Later later{};
    for (int64_t t = tile; t < end; ++t) {
      if (t == std::max(tile, end - kBefore) && unit < last) later = own.later(part);
      Tile rows = w.tile(p, begin + t);
      const float* const next = rows.next;
      for (int64_t panel = own.first(part), stop = own.first(part + 1); panel < stop; ++panel) {
        rows.next = at.fetches || panel + 1 == stop ? next : nullptr;
        at.tile(p, rows, panel, own.at(part, panel), later);
      }
    }
  }
}

}  // namespace

void convolve_pointwise(const Pointwise& p) {
  const Stages& at = stages();
  const Work w(p, at);
  torch::stable::parallel_for(0, w.tiles * w.parts, 1,
                              [&](int64_t first, int64_t last) { multiply_units(p, at, w, first, last); });
}

}  // namespace resnet_fused::cpu
