// A 3x3 convolution of stride 1, or the gradient of its input, by F(2x2, 3x3) or F(4x4, 3x3): 16/36 or 36/144 of
// the multiplications, which bind.
//
// The transformed input of a block of tiles stays in the second-level cache while all panels of the weight pass by, or,
// where the weight is larger than the input, a panel of it while all blocks do. No result depends on the number of
// threads: an output is a sum over channels in their order, and blocks, whose sums make the statistics, depend on the
// shape alone.
// Bytes: x, weight and z once; FLOPs counted as the direct sum's, 2*M*K*C*9.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <atomic>
#include <string_view>
#include <tuple>
#include <vector>

#include "../checks/winograd_conv3x3.h"
#include "alloc.h"
#include "moments.h"
#include "panels.h"
#include "winograd_outputs.h"
#include "winograd_stages.h"
#include "winograd_work.h"

namespace resnet_fused::cpu {
namespace {

// The stages at one level of the machine.
struct Stages {
  int64_t panel, rows;  // columns of a panel; rows of sums that registers hold
  void (*inputs)(const Problem&, int64_t, float*, const float*);
  void (*weights)(const Problem&, int64_t, int64_t, int64_t, float*);
  bool (*outputs)(const Problem&, int64_t, int64_t, const float*, const float*, float*, const Sums&, const float*);
};

template <class L, int64_t M>
struct At;

// The weight of tiles of 4x4 is transformed in double, as rounding matters more.
#define RESNET_FUSED_STAGES(LEVEL, TARGET, M, TAP)                                                             \
  template <>                                                                                                  \
  struct At<LEVEL, M> {                                                                                        \
    TARGET static void inputs(const Problem& p, int64_t block, float* v, const float* zeros) {                 \
      transform_inputs<LEVEL, Filtering<M>>(p, block, v, zeros);                                               \
    }                                                                                                          \
    TARGET static void weights(const Problem& p, int64_t panel, int64_t begin, int64_t end, float* u) {        \
      transform_weights<LEVEL, Filtering<M>, TAP>(p, panel, begin, end, nullptr, u);                           \
    }                                                                                                          \
    TARGET static bool outputs(const Problem& p, int64_t block, int64_t panel, const float* v, const float* u, \
                               float* m, const Sums& sums, const float* next) {                                \
      return write_outputs<LEVEL, Filtering<M>, LEVEL::panel>(p, block, panel, v, u, m, sums, Plain{}, next);  \
    }                                                                                                          \
    static constexpr Stages stages{LEVEL::panel, LEVEL::rows, inputs, weights, outputs};                       \
  };

RESNET_FUSED_STAGES(Level512, RESNET_FUSED_TARGET_512, 2, float)
RESNET_FUSED_STAGES(Level256, RESNET_FUSED_TARGET_256, 2, float)
RESNET_FUSED_STAGES(Level128, , 2, float)
RESNET_FUSED_STAGES(Level512, RESNET_FUSED_TARGET_512, 4, double)
RESNET_FUSED_STAGES(Level256, RESNET_FUSED_TARGET_256, 4, double)
RESNET_FUSED_STAGES(Level128, , 4, double)
#undef RESNET_FUSED_STAGES

template <int64_t M>
const Stages& stages_of() {
  static const std::string_view level = cpu_level();
  if (level == "avx512") return At<Level512, M>::stages;
  return level == "avx2" ? At<Level256, M>::stages : At<Level128, M>::stages;
}

// Whether panel by panel of the weight passes the whole input, see above.
bool is_small(const Problem& p) { return p.tiles < p.K; }

// Tiles of a block, in whole groups of product.h's rows. Where panels pass, few, for each group of which a panel comes
// from the second-level cache, in which one of larger tiles has no room: then many. Else so many that what is
// transformed fits that cache beside a panel and its products, and no more than leave every thread of a common machine
// several blocks.
int64_t tiles_of_a_block(const Problem& p, int64_t group) {
  constexpr int64_t kFloats = int64_t(172) << 10, kMost = 56, kLeast = 42, kBlocks = 16, kFew = 28;
  if (is_small(p)) return ((p.outputs == 2 ? 1 : 3) * kFew + group - 1) / group * group;
  const int64_t fit = std::clamp(kFloats / (p.values() * p.C), kLeast, kMost);
  return std::max(std::min(fit, p.tiles / kBlocks) / group, int64_t(1)) * group;
}

constexpr int64_t kChannelsAtOnce = 64;  // of a weight's panel, a unit of work

Problem problem_of(const Tensor& x, const Tensor& weight, const Tensor& z, int64_t padding, bool transposed,
                   int64_t outputs, const Stages& at) {
  Problem p{};
  p.x = data<float>(x), p.weight = data<float>(weight), p.z = data<float>(z);
  p.N = x.size(0), p.C = x.size(1), p.H = x.size(2), p.W = x.size(3);
  p.K = z.size(1), p.P = z.size(2), p.Q = z.size(3);
  p.padding = transposed ? 2 - padding : padding;
  p.stride_k = weight.stride(0), p.stride_c = weight.stride(1);
  p.stride_r = weight.stride(2), p.stride_s = weight.stride(3);
  if (transposed) {  // channels exchanged, taps read from the last to the first
    std::swap(p.stride_k, p.stride_c);
    p.weight += 2 * (p.stride_r + p.stride_s);
    p.stride_r = -p.stride_r, p.stride_s = -p.stride_s;
  }
  p.cut(outputs, at.panel);
  p.u_pitch = at.panel, p.u_gap = Problem::kGap;
  const int64_t most = tiles_of_a_block(p, at.rows);
  p.blocks = (p.tiles + most - 1) / most;
  return p;
}

template <int64_t M>
int64_t outputs_of(const Problem& p, int64_t block) {
  Tile<M> tile(p, p.first_tile(block));
  int64_t count = 0;
  for (int64_t t = 0; t < p.size(block); ++t, tile.advance(p)) count += tile.rows(p) * tile.columns(p);
  return count;
}

struct Statistics {
  int64_t channels;                       // a multiple of the panel
  std::vector<float> pivot, sum, square;  // [blocks, channels]

  Statistics(const Problem& p, bool wanted) : channels(wanted ? p.panels * p.panel : 0) {
    for (auto* part : {&pivot, &sum, &square}) part->resize(p.blocks * channels);
  }
  Sums of(int64_t block) {
    if (channels == 0) return {};
    return {&pivot[block * channels], &sum[block * channels], &square[block * channels]};
  }

  void merge(const Problem& p, const Tensor& mean, const Tensor& m2) {
    std::vector<int64_t> rows(p.blocks);
    for (int64_t block = 0; block < p.blocks; ++block) {
      rows[block] = p.outputs == 2 ? outputs_of<2>(p, block) : outputs_of<4>(p, block);
    }
    torch::stable::parallel_for(0, p.K, 64, [&](int64_t begin, int64_t end) {
      const int64_t C = end - begin;
      std::vector<double> total(C), square_sum(C);
      int64_t count = 0;
      for (int64_t block = 0; block < p.blocks; count += rows[block++]) {
        const int64_t at = block * channels + begin;
        merge_block(total.data(), square_sum.data(), count, &pivot[begin], &pivot[at], &sum[at], &square[at],
                    rows[block], C);
      }
      for (int64_t c = 0; c < C; ++c) {
        data<float>(mean)[begin + c] = static_cast<float>(pivot[begin + c] + total[c] / static_cast<double>(count));
        data<float>(m2)[begin + c] = static_cast<float>(square_sum[c]);
      }
    });
  }
};

// Panel by panel of the weight, past the whole input.
bool by_panel(const Problem& p, const Stages& at, Statistics& statistics) {
  std::atomic<bool> finite{true};
  const auto v = aligned_array<float>(p.v_size(p.tiles));
  const std::vector<float> zeros(p.C);
  const auto input_of = [&](int64_t block) { return v.get() + p.v_size(p.first_tile(block)); };
  share(p.blocks, [&] { return [&](int64_t block) { at.inputs(p, block, input_of(block), zeros.data()); }; });
  share(p.panels, [&] {
    return [&, u = aligned_array<float>(p.u_size()), m = aligned_array<float>(p.m_size())](int64_t panel) {
      at.weights(p, panel, 0, p.C, u.get());
      for (int64_t block = 0; block < p.blocks && finite; ++block) {
        if (!at.outputs(p, block, panel, input_of(block), u.get(), m.get(), statistics.of(block), u.get()))
          finite = false;
      }
    };
  });
  return finite;
}

// Block by block of the input, past the whole weight.
bool by_block(const Problem& p, const Stages& at, Statistics& statistics) {
  std::atomic<bool> finite{true};
  const auto u = aligned_array<float>(p.panels * p.u_size());
  const int64_t parts = (p.C + kChannelsAtOnce - 1) / kChannelsAtOnce;
  share(p.panels * parts, [&] {
    return [&](int64_t unit) {
      const int64_t panel = unit / parts, begin = unit % parts * kChannelsAtOnce;
      at.weights(p, panel, begin, std::min(p.C, begin + kChannelsAtOnce), u.get() + panel * p.u_size());
    };
  });
  const std::vector<float> zeros(p.C);
  share(p.blocks, [&] {
    return
        [&, v = aligned_array<float>(p.v_size(p.most_tiles())), m = aligned_array<float>(p.m_size())](int64_t block) {
          if (!finite) return;
          at.inputs(p, block, v.get(), zeros.data());
          for (int64_t panel = 0; panel < p.panels; ++panel) {
            const float* weight = u.get() + panel * p.u_size();
            const float* next = u.get() + (panel + 1) % p.panels * p.u_size();
            if (!at.outputs(p, block, panel, v.get(), weight, m.get(), statistics.of(block), next)) finite = false;
          }
        };
  });
  return finite;
}

// What ATen makes of it. The transforms may overflow where a direct sum does not, and which of inf and NaN a sum
// becomes depends on its order: where a result is not finite, all of them are taken from there.
Tensor direct(const Tensor& x, const Tensor& weight, const Tensor& z, int64_t padding, bool transposed) {
  using torch::stable::detail::from;
  if (!transposed) return aten_convolution(x, weight, padding);
  static const std::array<bool, 3> wanted{true, false, false};
  std::array<StableIValue, 11> stack{from(x),
                                     from(z),
                                     from(weight),
                                     from(std::nullopt),
                                     ints({1, 1}),
                                     ints({padding, padding}),
                                     ints({1, 1}),
                                     from(false),
                                     ints({0, 0}),
                                     from(int64_t(1)),
                                     from(torch::headeronly::HeaderOnlyArrayRef<bool>(wanted.data(), 3))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  for (size_t i : {1, 2}) torch::stable::detail::to<Tensor>(stack[i]);  // undefined, but ours to free
  return torch::stable::detail::to<Tensor>(stack[0]);
}

std::tuple<Tensor, Tensor, Tensor> winograd_conv3x3(const Tensor& x, const Tensor& weight, int64_t padding,
                                                    bool transposed, bool statistics, int64_t outputs) {
  check_winograd_conv3x3(x, weight, padding, transposed, outputs);
  const int64_t grows = transposed ? 2 - 2 * padding : 2 * padding - 2;
  const int64_t K = weight.size(transposed ? 1 : 0), P = x.size(2) + grows, Q = x.size(3) + grows;
  Tensor z = empty_images(x.size(0), K, P, Q, ScalarType::Float);
  Tensor mean = empty_stats(z, statistics), m2 = empty_stats(z, statistics);
  if (x.numel() == 0 || z.numel() == 0) {
    for (const Tensor* t : {&z, &mean, &m2}) std::fill_n(data<float>(*t), t->numel(), 0.0f);
    return {z, mean, m2};
  }
  const Stages& at = outputs == 2 ? stages_of<2>() : stages_of<4>();
  const Problem p = problem_of(x, weight, z, padding, transposed, outputs, at);
  Statistics sums(p, statistics);
  if (is_small(p) ? by_panel(p, at, sums) : by_block(p, at, sums)) {
    if (statistics) sums.merge(p, mean, m2);
    return {z, mean, m2};
  }
  Tensor other = direct(x, weight, z, padding, transposed);
  torch::stable::copy_(z, other);
  if (statistics) {
    const float* rows = data<float>(z);
    moments(Shape(z), rows, mean, m2, [&](int64_t c) { return rows[c]; }, [](int64_t, int64_t) {});
  }
  return {z, mean, m2};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { m.impl("winograd_conv3x3", TORCH_BOX(&winograd_conv3x3)); }

}  // namespace resnet_fused::cpu
