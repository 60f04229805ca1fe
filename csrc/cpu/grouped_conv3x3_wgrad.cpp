// Weight gradient of a grouped 3x3 convolution.
//
// A unit of work is some strips of pixels and a range of channels, of which both tensors are packed so that a slot's
// pixels lie side by side. A strip's sums are in registers and then added to the unit's, and those of the units, in
// double, in their order: no result depends on the number of threads.
// Bytes: grad and x once; FLOPs 2*M*C*width*9.
#include "../checks/grouped_conv3x3_wgrad.h"

#include <torch/csrc/stable/library.h>

#include <string_view>
#include <vector>

#include "alloc.h"
#include "grouped_wgrad.h"
#include "panels.h"
#include "rows.h"
#include "winograd_work.h"

namespace resnet_fused::cpu {
namespace {

using Add = void (*)(const Grouped&, const Unit&, int64_t, const float*, const float*, float*);

// The stages at one level of the machine.
struct Stages {
  int64_t lanes, inputs;
  void (*pack)(const Grouped&, const Unit&, const float*, float*);
  void (*pack_grad)(const Grouped&, const Unit&, const float*, float*);
  Add (*add)(const Grouped&);
};

template <class L>
struct At;

#define RESNET_FUSED_STAGES(LEVEL, TARGET, SHARED)                                                                   \
  template <>                                                                                                        \
  struct At<LEVEL> {                                                                                                 \
    TARGET static void pack(const Grouped& g, const Unit& unit, const float* x, float* dst) {                        \
      pack_read<LEVEL>(g, unit, x, dst);                                                                             \
    }                                                                                                                \
    TARGET static void pack_grad(const Grouped& g, const Unit& unit, const float* grad, float* dst) {                \
      const float* first = grad + (unit.sample * g.P + unit.first_row) * g.Q * g.C;                                  \
      pack_rows<LEVEL>(g, unit, first, unit.end_row - unit.first_row, g.Q, g.strip_rows * (g.Q + 2) * g.lanes, dst); \
    }                                                                                                                \
    template <bool strided, bool shared>                                                                             \
    TARGET static void add(const Grouped& g, const Unit& unit, int64_t depth, const float* x, const float* grad,     \
                           float* dst) {                                                                             \
      add_strip<LEVEL, strided, shared>(g, unit, depth, x, grad, dst);                                               \
    }                                                                                                                \
    static Add choose(const Grouped& g) {                                                                            \
      if constexpr (SHARED) {                                                                                        \
        if (g.shared) return g.stride == 2 ? add<true, true> : add<false, true>;                                     \
      }                                                                                                              \
      return g.stride == 2 ? add<true, false> : add<false, false>;                                                   \
    }                                                                                                                \
    static constexpr Stages stages{LEVEL::lanes, kWgradInputs<LEVEL>, pack, pack_grad, choose};                      \
  };

#ifdef RESNET_FUSED_LEVEL_512
RESNET_FUSED_STAGES(Level512, RESNET_FUSED_TARGET_512, true)
RESNET_FUSED_STAGES(Level256, RESNET_FUSED_TARGET_256, true)
#endif
RESNET_FUSED_STAGES(Level128, , false)
#undef RESNET_FUSED_STAGES

const Stages& stages() {
#ifdef RESNET_FUSED_LEVEL_512
  static const std::string_view level = cpu_level();
  if (level == "avx512") return At<Level512>::stages;
  if (level == "avx2") return At<Level256>::stages;
#endif
  return At<Level128>::stages;
}

// How many units share the strips: as many as keep the threads of a common machine busy, unless their sums get large.
int64_t chunks_of(const Grouped& g, int64_t sums) {
  constexpr int64_t kUnits = 32, kMost = int64_t(1) << 20;
  return std::clamp<int64_t>(std::min((kUnits + g.ranges - 1) / g.ranges, kMost / sums), 1, g.N * g.strips);
}

// grad_w of one slot from the sums of all chunks, which are `pitch` apart.
void add_chunks(const Grouped& g, int64_t depth, int64_t slot, int64_t chunks, int64_t pitch, const float* sums,
                const Tensor& grad_w) {
  const int64_t first = g.first_channel(slot), channels = g.channels(slot), step = grad_w.stride(0);
  for (int64_t r = 0; r < 3; ++r) {
    for (int64_t j = 0; j < g.width; ++j) {
      for (int64_t s = 0; s < 3; ++s) {
        const float* at = sums + ((r * depth + j) * 3 + s) * g.lanes;
        float* to =
            data<float>(grad_w) + first * step + j * grad_w.stride(1) + r * grad_w.stride(2) + s * grad_w.stride(3);
        double total[16] = {};
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          for (int64_t lane = 0; lane < g.lanes; ++lane) total[lane] += at[chunk * pitch + lane];
        }
        for (int64_t lane = 0; lane < channels; ++lane) to[lane * step] = static_cast<float>(total[lane]);
      }
    }
  }
}

Tensor grouped_conv3x3_wgrad(const Tensor& grad, const Tensor& x, const Tensor& weight, int64_t stride) {
  check_grouped_conv3x3_wgrad(grad, x, weight, stride);
  Tensor grad_w =
      empty_strided<4>({weight.size(0), weight.size(1), 3, 3},
                       {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)}, ScalarType::Float);
  if (grad.numel() == 0) {
    std::fill_n(data<float>(grad_w), grad_w.numel(), 0.0f);
    return grad_w;
  }
  const Stages& at = stages();
  Grouped g{};
  g.N = x.size(0), g.C = x.size(1), g.H = x.size(2), g.W = x.size(3), g.P = grad.size(2), g.Q = grad.size(3);
  g.width = weight.size(1), g.stride = stride, g.lanes = at.lanes;
  g.cut();
  const int64_t depth = (g.width + at.inputs - 1) / at.inputs * at.inputs, of_slot = 9 * depth * g.lanes;
  const int64_t pitch = g.slots * of_slot, chunks = chunks_of(g, pitch), strips = g.N * g.strips;
  const int64_t grad_slot = g.strip_rows * (g.Q + 2) * g.lanes;
  const auto sums = aligned_array<float>(chunks * pitch);
  const Add add = at.add(g);
  share(g.ranges * chunks, [&] {
    return [&, xs = aligned_array<float>(g.packed_size()),
            grads = aligned_array<float>(g.range_slots * grad_slot)](int64_t i) {
      const int64_t range = i / chunks, chunk = i % chunks;
      for (int64_t strip = strips * chunk / chunks; strip < strips * (chunk + 1) / chunks; ++strip) {
        const Unit unit = g.unit(range, strip);
        if (strip == strips * chunk / chunks) {
          float* first = sums.get() + chunk * pitch + unit.first_slot * of_slot;
          std::fill_n(first, (unit.end_slot - unit.first_slot) * of_slot, 0.0f);
        }
        at.pack(g, unit, data<float>(x), xs.get());
        at.pack_grad(g, unit, data<float>(grad), grads.get());
        for (int64_t slot = unit.first_slot; slot < unit.end_slot; ++slot) {
          add(g, unit, depth, xs.get() + g.group_slot(unit, slot) * g.packed_slot(),
              grads.get() + (slot - unit.first_slot) * grad_slot, sums.get() + chunk * pitch + slot * of_slot);
        }
      }
    };
  });
  torch::stable::parallel_for(0, g.slots, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      add_chunks(g, depth, slot, chunks, pitch, sums.get() + slot * of_slot, grad_w);
    }
  });
  return grad_w;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { m.impl("grouped_conv3x3_wgrad", TORCH_BOX(&grouped_conv3x3_wgrad)); }

}  // namespace resnet_fused::cpu
