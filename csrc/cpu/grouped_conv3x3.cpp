// A grouped 3x3 convolution, or the gradient of its input, and the statistics of what it makes.
//
// A unit of work is a strip of rows of a sample and a range of channels. What it reads is packed once, so that a slot's
// pixels lie side by side, whatever the number of channels; then a weight of a slot passes the strip from the
// first-level cache. No value is multiplied by a zero between groups. No result depends on the number of threads: units
// depend on the shape alone, and their sums are added in order.
// Bytes: x, weight and z once; FLOPs 2*M*C*width*9.
#include "../checks/grouped_conv3x3.h"

#include <torch/csrc/stable/library.h>

#include <array>
#include <string_view>
#include <tuple>
#include <vector>

#include "alloc.h"
#include "grouped_conv3x3.h"
#include "moments.h"
#include "panels.h"
#include "winograd_work.h"

namespace resnet_fused::cpu {
namespace {

using Convolve = void (*)(const Grouped&, const Unit&, int64_t, const float*, const float*, const SlotSums&, float*);

// The stages at one level of the machine.
struct Stages {
  int64_t lanes;
  void (*pack)(const Grouped&, const Unit&, const float*, float*);
  Convolve (*convolve)(const Grouped&);
};

// The block that takes a row with the least work; a small one leaves the units waiting for its few sums.
template <int64_t... sizes>
int64_t block_of(const Grouped& g, std::integer_sequence<int64_t, sizes...>) {
  int64_t best = 0, least = INT64_MAX;
  for (const int64_t size : {sizes...}) {
    if (size > g.columns() || (g.scatters() && size % 2)) continue;
    const int64_t work = (g.columns() + size - 1) / size * (std::max<int64_t>(size, 8) + 2);
    if (work < least) best = size, least = work;
  }
  return best;
}

template <class L>
struct At;

#define RESNET_FUSED_STAGES(LEVEL, TARGET, SHARED, ...)                                                \
  template <>                                                                                          \
  struct At<LEVEL> {                                                                                   \
    using Sizes = std::integer_sequence<int64_t, __VA_ARGS__>;                                         \
    TARGET static void pack(const Grouped& g, const Unit& unit, const float* x, float* dst) {          \
      pack_read<LEVEL>(g, unit, x, dst);                                                               \
    }                                                                                                  \
    template <Walk walk, int64_t Q, bool shared>                                                       \
    TARGET static void convolve(const Grouped& g, const Unit& unit, int64_t slot, const float* packed, \
                                const float* weight, const SlotSums& sums, float* z) {                 \
      convolve_strip<LEVEL, walk, Q, shared>(g, unit, slot, packed, weight, sums, z);                  \
    }                                                                                                  \
    template <bool shared, int64_t Q>                                                                  \
    static Convolve walk_of(const Grouped& g) {                                                        \
      if (g.scatters()) {                                                                              \
        if constexpr (Q % 2 == 0) return convolve<Walk::kScattered, Q, shared>;                        \
      }                                                                                                \
      return g.stride == 2 ? convolve<Walk::kStrided, Q, shared> : convolve<Walk::kPlain, Q, shared>;  \
    }                                                                                                  \
    template <bool shared, int64_t... Q>                                                               \
    static Convolve size_of(const Grouped& g, std::integer_sequence<int64_t, Q...> sizes) {            \
      Convolve found = nullptr;                                                                        \
      const int64_t size = block_of(g, sizes);                                                         \
      ((Q == size ? void(found = walk_of<shared, Q>(g)) : void()), ...);                               \
      return found;                                                                                    \
    }                                                                                                  \
    static Convolve choose(const Grouped& g) {                                                         \
      if constexpr (SHARED) {                                                                          \
        if (g.shared) return size_of<true>(g, Sizes{});                                                \
      }                                                                                                \
      return size_of<false>(g, Sizes{});                                                               \
    }                                                                                                  \
    static constexpr Stages stages{LEVEL::lanes, pack, choose};                                        \
  };

#ifdef RESNET_FUSED_LEVEL_512
RESNET_FUSED_STAGES(Level512, RESNET_FUSED_TARGET_512, true, 14, 8, 7, 4, 2, 1)
RESNET_FUSED_STAGES(Level256, RESNET_FUSED_TARGET_256, true, 8, 7, 4, 2, 1)
#endif
RESNET_FUSED_STAGES(Level128, , false, 8, 7, 4, 2, 1)
#undef RESNET_FUSED_STAGES

const Stages& stages() {
#ifdef RESNET_FUSED_LEVEL_512
  static const std::string_view level = cpu_level();
  if (level == "avx512") return At<Level512>::stages;
  if (level == "avx2") return At<Level256>::stages;
#endif
  return At<Level128>::stages;
}

Grouped problem_of(const Tensor& x, const Tensor& weight, const Tensor& z, int64_t stride, bool transposed) {
  Grouped g{};
  g.N = x.size(0), g.C = x.size(1), g.H = x.size(2), g.W = x.size(3), g.P = z.size(2), g.Q = z.size(3);
  g.width = weight.size(1), g.stride = stride;
  g.transposed = transposed, g.lanes = stages().lanes;
  g.cut();
  return g;
}

// Of each unit and channel; empty where nobody asked.
struct Statistics {
  int64_t channels;                       // of the slots
  std::vector<float> pivot, sum, square;  // [samples * strips, channels]

  Statistics(const Grouped& g, bool wanted) : channels(wanted ? g.slots * g.lanes : 0) {
    for (auto* part : {&pivot, &sum, &square}) part->resize(g.N * g.strips * channels);
  }
  SlotSums of(const Grouped& g, const Unit& unit, int64_t slot) {
    if (channels == 0) return {};
    const int64_t at = (unit.sample * g.strips + unit.strip) * channels + slot * g.lanes;
    return {&pivot[at], &sum[at], &square[at]};
  }

  void merge(const Grouped& g, const Tensor& mean, const Tensor& m2) const {
    std::vector<double> total(channels), squares(channels);
    int64_t count = 0;
    for (int64_t strip = 0; strip < g.N * g.strips; ++strip) {
      const int64_t at = strip * channels, rows = g.rows_of(strip % g.strips) * g.Q;
      merge_block(total.data(), squares.data(), count, pivot.data(), &pivot[at], &sum[at], &square[at], rows, channels);
      count += rows;
    }
    for (int64_t slot = 0; slot < g.slots; ++slot) {
      for (int64_t i = 0; i < g.channels(slot); ++i) {
        const int64_t c = g.first_channel(slot) + i, at = slot * g.lanes + i;
        data<float>(mean)[c] = static_cast<float>(pivot[at] + total[at] / static_cast<double>(count));
        data<float>(m2)[c] = static_cast<float>(squares[at]);
      }
    }
  }
};

std::tuple<Tensor, Tensor, Tensor> grouped_conv3x3(const Tensor& x, const Tensor& weight, int64_t stride,
                                                   bool transposed, bool statistics,
                                                   const std::vector<int64_t>& output_padding) {
  const auto [P, Q] = check_grouped_conv3x3(x, weight, stride, transposed, output_padding);
  Tensor z = empty_images(x.size(0), x.size(1), P, Q, ScalarType::Float);
  Tensor mean = empty_stats(z, statistics), m2 = empty_stats(z, statistics);
  if (z.numel() == 0) {
    for (const Tensor* t : {&mean, &m2}) std::fill_n(data<float>(*t), t->numel(), 0.0f);
    return {z, mean, m2};
  }
  const Grouped g = problem_of(x, weight, z, stride, transposed);
  const Stages& at = stages();
  const std::array strides{weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)};
  const auto taps = aligned_array<float>(g.slots * g.weight_slot());
  torch::stable::parallel_for(0, g.slots, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      pack_weight(g, data<float>(weight), strides, slot, taps.get() + slot * g.weight_slot());
    }
  });
  Statistics sums(g, statistics);
  const Convolve convolve = at.convolve(g);
  share(g.ranges * g.N * g.strips, [&] {
    return [&, packed = aligned_array<float>(g.packed_size())](int64_t i) {
      const Unit unit = g.unit(i / (g.N * g.strips), i % (g.N * g.strips));
      at.pack(g, unit, data<float>(x), packed.get());
      for (int64_t slot = unit.first_slot; slot < unit.end_slot; ++slot) {
        convolve(g, unit, slot, packed.get() + g.group_slot(unit, slot) * g.packed_slot(),
                 taps.get() + slot * g.weight_slot(), sums.of(g, unit, slot), data<float>(z));
      }
    };
  });
  if (statistics) sums.merge(g, mean, m2);
  return {z, mean, m2};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { m.impl("grouped_conv3x3", TORCH_BOX(&grouped_conv3x3)); }

}  // namespace resnet_fused::cpu
