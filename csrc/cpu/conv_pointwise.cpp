#include "conv_pointwise.h"

#include <torch/csrc/stable/ops.h>

#include <string_view>
#include <cstdlib>

#include "conv_pointwise_stages.h"

namespace resnet_fused::cpu {
namespace {

struct Stages {
  int64_t panel;
  void (*pack)(const Pointwise&, int64_t, float*);
  void (*gather)(const Activation&, int64_t, int64_t, float*, int64_t);
  void (*tile)(const Pointwise&, int64_t, int64_t, const float*, int64_t, int64_t, const float*);
};

template <class L>
struct At;

#define RESNET_FUSED_STAGES(LEVEL, TARGET)                                                                            \
  template <>                                                                                                         \
  struct At<LEVEL> {                                                                                                  \
    TARGET static void pack(const Pointwise& p, int64_t panel, float* packed) { pack_pointwise<LEVEL>(p, panel, packed); } \
    TARGET static void gather(const Activation& x, int64_t row, int64_t rows, float* to, int64_t pitch) {             \
      write_activation<LEVEL>(x, row, rows, 0, x.C, to, pitch);                                                       \
    }                                                                                                                 \
    TARGET static void tile(const Pointwise& p, int64_t row, int64_t rows, const float* a, int64_t a_pitch,           \
                            int64_t panel, const float* packed) {                                                     \
      multiply_tile<LEVEL>(p, row, rows, a, a_pitch, panel, packed);                                                  \
    }                                                                                                                 \
    static constexpr Stages stages{LEVEL::panel, pack, gather, tile};                                                 \
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

}  // namespace

void run_pointwise(const Pointwise& p) {
  const Stages& at = stages();
  const int64_t tiles = (p.rows + kTile - 1) / kTile, panels = (p.K + at.panel - 1) / at.panel;
  const int64_t packed_size = rounded_up((p.C + 2) * at.panel, 16);
  const Activation input{p.x, nullptr, nullptr, p.C, p.pixels};
  const bool direct = p.pixels.dense() && (p.C % 1024 || env("NODIRECT",0)!=2) && !(env("NODIRECT", 0)==1);
  const int64_t pitch = direct ? p.C : pitch_of(p.C);
  const auto rows_of = [&](int64_t tile) { return std::min(kTile, p.rows - tile * kTile); };
  if (tiles < panels) {
    AlignedArray<float> gathered;
    if (!direct) {
      gathered = aligned_array<float>(p.rows * pitch);
      share_units(tiles, [&] {
        return [&](int64_t tile) { at.gather(input, tile * kTile, rows_of(tile), gathered.get() + tile * kTile * pitch, pitch); };
      });
    }
    const float* x = direct ? p.x : gathered.get();
    share_units(panels, [&] {
      return [&, packed = aligned_array<float>(packed_size)](int64_t panel) {
        at.pack(p, panel, packed.get());
        for (int64_t tile = 0; tile < tiles; ++tile) {
          at.tile(p, tile * kTile, rows_of(tile), x + tile * kTile * pitch, pitch, panel, packed.get());
        }
      };
    });
    return;
  }
  const auto packed = aligned_array<float>(panels * packed_size);
  share_units(panels, [&] { return [&](int64_t panel) { at.pack(p, panel, packed.get() + panel * packed_size); }; });
  const int64_t l2 = env("XKB", 192) << 8;
  const int64_t most = p.K * p.C <= (env("WKB", 384) << 8) ? env("SMALL", 1) : std::max(l2 / (p.C * kTile), int64_t(1));
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t chunks = rounded_up((tiles + most - 1) / most, std::min(threads, tiles));
  share_units(chunks, [&] {
    return [&, scratch = aligned_array<float>(direct ? 1 : (tiles / chunks + 1) * kTile * pitch)](int64_t chunk) {
      const int64_t begin = tiles * chunk / chunks, end = tiles * (chunk + 1) / chunks, row = begin * kTile;
      if (!direct) at.gather(input, row, std::min(p.rows, end * kTile) - row, scratch.get(), pitch);
      const float* x = direct ? p.x + row * pitch : scratch.get();
      for (int64_t panel = 0; panel < panels; ++panel) {
        for (int64_t tile = begin; tile < end; ++tile) {
          at.tile(p, tile * kTile, rows_of(tile), x + (tile - begin) * kTile * pitch, pitch, panel, packed.get() + panel * packed_size);
        }
      }
    };
  });
}

}  // namespace resnet_fused::cpu
