// A 3x3 convolution of stride 1 or 2 by Winograd's filtering with a transformed weight that is kept, and shift, sum and
// ReLU in the output's transform.
//
// Tiles come in blocks, whose transformed input stays in the second-level cache while all panels of the weight pass by;
// or, where the weight is larger than the input, tiles meet what of it makes one sum after the other. No result depends
// on the number of threads: an output is a sum over channels in their order. Bytes: x, residual, packed and out once;
// FLOPs counted as the direct sum's, 2*M*K*C*9.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cmath>
#include <string_view>
#include <vector>

#include "../checks/winograd_conv3x3_add_relu.h"
#include "alloc.h"
#include "panels.h"
#include "rows.h"
#include "winograd_outputs.h"
#include "winograd_stages.h"
#include "winograd_strided.h"
#include "winograd_work.h"

namespace resnet_fused::cpu {
namespace {

// The stages at one level of the machine, of a size of tiles.
struct Stages {
  int64_t panel, rows;  // columns of a panel; rows of sums that registers hold
  void (*inputs)(const Problem&, int64_t, Problem::Range, float*, const float*);
  void (*products)(const Problem&, int64_t, int64_t, const float*, const float*, float*, const float*);
  bool (*write)(const Problem&, int64_t, int64_t, Problem::Range, float*, const Epilogue&);
  bool (*outputs)(const Problem&, int64_t, int64_t, const float*, const float*, float*, const Epilogue&, const float*);
};

template <class L, class F>
struct At;

#define RESNET_FUSED_STAGES(LEVEL, TARGET, TRANSFORM, ...)                                                           \
  template <>                                                                                                        \
  struct At<LEVEL, __VA_ARGS__> {                                                                                    \
    using F = __VA_ARGS__;                                                                                           \
    TARGET static void inputs(const Problem& p, int64_t block, Problem::Range tiles, float* v, const float* zeros) { \
      TRANSFORM(p, block, tiles, v, zeros);                                                                          \
    }                                                                                                                \
    TARGET static void products(const Problem& p, int64_t block, int64_t sum, const float* v, const float* u,        \
                                float* m, const float* next) {                                                       \
      const float* from = next ? next + first_value<F>(sum) * p.u_plane() : nullptr;                                 \
      multiply_sum<LEVEL, F, kPackedColumns, true>(p, block, sum, v, u, m, from, depth_of<F>(sum) * p.C);            \
    }                                                                                                                \
    TARGET static bool write(const Problem& p, int64_t block, int64_t panel, Problem::Range tiles, float* m,         \
                             const Epilogue& epilogue) {                                                             \
      return write_tiles<LEVEL, F>(p, block, panel, tiles, m, epilogue);                                             \
    }                                                                                                                \
    TARGET static bool outputs(const Problem& p, int64_t block, int64_t panel, const float* v, const float* u,       \
                               float* m, const Epilogue& epilogue, const float* next) {                              \
      return write_outputs<LEVEL, F, kPackedColumns>(p, block, panel, v, u, m, Sums{}, epilogue, next);              \
    }                                                                                                                \
    static constexpr Stages stages{LEVEL::panel, LEVEL::rows, inputs, products, write, outputs};                     \
  };
#define RESNET_FUSED_LEVEL(LEVEL, TARGET)                                                   \
  RESNET_FUSED_STAGES(LEVEL, TARGET, (transform_inputs<LEVEL, Filtering<2>>), Filtering<2>) \
  RESNET_FUSED_STAGES(LEVEL, TARGET, (transform_inputs<LEVEL, Filtering<4>>), Filtering<4>) \
  RESNET_FUSED_STAGES(LEVEL, TARGET, transform_strided_inputs<LEVEL>, Strided)

RESNET_FUSED_LEVEL(Level512, RESNET_FUSED_TARGET_512)
RESNET_FUSED_LEVEL(Level256, RESNET_FUSED_TARGET_256)
RESNET_FUSED_LEVEL(Level128, )
#undef RESNET_FUSED_LEVEL
#undef RESNET_FUSED_STAGES

template <class F>
const Stages& stages_of() {
  static const std::string_view level = cpu_level();
  if (level == "avx512") return At<Level512, F>::stages;
  return level == "avx2" ? At<Level256, F>::stages : At<Level128, F>::stages;
}

// By how many values a transformed weight has.
const Stages& stages_of(const Tensor& packed) {
  switch (packed.size(1)) {
    case 16: return stages_of<Filtering<2>>();
    case 36: return stages_of<Filtering<4>>();
    default: return stages_of<Strided>();
  }
}

// Where sums are made one after the other, tiles of a block, output channels at a time, and tiles that are transformed
// at a time.
constexpr int64_t kSumTiles = 12 * Level512::rows, kSumColumns = 128, kPart = 4;

// Whether so many tiles meet each sum's weight at a time, see above.
bool is_small(const Problem& p) { return p.tiles < p.K; }

// Tiles of a block, in whole groups of product.h's rows. Where sums are made one after the other, many, for each block
// reads the whole weight. Else so many that what is transformed fits the second-level cache beside a panel and its
// products, and no more than leave every thread of a common machine several blocks.
int64_t tiles_of_a_block(const Problem& p, int64_t group) {
  constexpr int64_t kFloats = int64_t(172) << 10, kMost = 84, kLeast = 28, kBlocks = 16;
  if (is_small(p)) return kSumTiles;
  const int64_t fit = std::clamp(kFloats / (p.values() * p.C), kLeast, p.stride == 2 ? kMost / 2 : kMost);
  return std::max(std::min(fit, p.tiles / kBlocks) / group, int64_t(1)) * group;
}

// Blocks of about so many tiles; where threads have several, as many each.
int64_t blocks_of(const Problem& p, int64_t most) {
  const int64_t blocks = (p.tiles + most - 1) / most, threads = torch::stable::get_num_threads();
  return is_small(p) || blocks <= threads ? blocks : (blocks + threads - 1) / threads * threads;
}

Problem problem_of(const Tensor& x, const Tensor& packed, const Tensor& out, int64_t padding, int64_t stride,
                   const Stages& at) {
  Problem p{};
  p.stride = stride;
  p.x = data<float>(x), p.z = data<float>(out), p.padding = padding;
  p.N = x.size(0), p.C = x.size(1), p.H = x.size(2), p.W = x.size(3);
  p.K = out.size(1), p.P = out.size(2), p.Q = out.size(3);
  p.cut(packed.size(1) == 36 ? 4 : 2, at.panel);
  p.u_pitch = kPackedColumns;
  if (is_small(p)) p.m_columns = p.panels * p.panel;
  p.blocks = blocks_of(p, tiles_of_a_block(p, at.rows));
  return p;
}

// Where a panel of the weight begins.
const float* weight_of(const Problem& p, const float* packed, int64_t panel) {
  const int64_t column = panel * p.panel;
  return packed + column / kPackedColumns * p.u_size() + column % kPackedColumns;
}

// Sum by sum, of many tiles at a time: what meets of a weight that is larger than the input is read once for all of
// them. Whether all is finite.
bool by_sum(const Problem& p, const Stages& at, const float* packed, const Epilogue& epilogue) {
  std::atomic<bool> finite{true};
  // Several MiB each, on kept memory.
  const Tensor values = empty_images(1, p.v_size(p.most_tiles()), 1, 1, ScalarType::Float);
  const Tensor sums = empty_images(1, p.m_size(), 1, 1, ScalarType::Float);
  float *v = data<float>(values), *m = data<float>(sums);
  const std::vector<float> zeros(p.C);
  const int64_t panels = kSumColumns / p.panel, groups = (p.panels + panels - 1) / panels;
  for (int64_t block = 0; block < p.blocks && finite; ++block) {
    const int64_t count = p.size(block), parts = (count + kPart - 1) / kPart;
    const auto tiles = [&](int64_t part) { return Problem::Range{part * kPart, std::min(count, (part + 1) * kPart)}; };
    share(parts, [&] { return [&](int64_t part) { at.inputs(p, block, tiles(part), v, zeros.data()); }; });
    share(p.sums() * groups, [&] {
      return [&](int64_t unit) {
        const int64_t first = unit % groups * panels, end = std::min(p.panels, first + panels);
        for (int64_t panel = first; panel < end; ++panel) {
          const float* next = panel + 1 < p.panels ? weight_of(p, packed, panel + 1) : nullptr;
          const float* weight = weight_of(p, packed, panel);
          at.products(p, block, unit / groups, v, weight, m + panel * p.panel, next);
        }
      };
    });
    share(parts, [&] {
      return [&](int64_t part) {
        for (int64_t panel = 0; panel < p.panels; ++panel) {
          if (!at.write(p, block, panel, tiles(part), m + panel * p.panel, epilogue)) finite = false;
        }
      };
    });
  }
  return finite;
}

// Block by block of the input, past the whole weight. Whether all is finite.
bool by_block(const Problem& p, const Stages& at, const float* packed, const Epilogue& epilogue) {
  std::atomic<bool> finite{true};
  const std::vector<float> zeros(p.C);
  share(p.blocks, [&] {
    return
        [&, v = aligned_array<float>(p.v_size(p.most_tiles())), m = aligned_array<float>(p.m_size())](int64_t block) {
          if (!finite) return;
          at.inputs(p, block, {0, p.size(block)}, v.get(), zeros.data());
          for (int64_t panel = 0; panel < p.panels; ++panel) {
            const float* weight = weight_of(p, packed, panel);
            const float* next = weight_of(p, packed, (panel + 1) % p.panels);
            if (!at.outputs(p, block, panel, v.get(), weight, m.get(), epilogue, next)) finite = false;
          }
        };
  });
  return finite;
}

// The same of ATen's convolution. The transforms may overflow where a direct sum does not, and which of inf and NaN a
// sum becomes depends on its order: where a sum is not finite, all of them are taken from there.
void direct(const Tensor& x, const Tensor& weight, const OptionalTensor& scale, const Epilogue& epilogue,
            int64_t padding, int64_t stride, const Tensor& out) {
  Tensor result = out, sums = aten_convolution(x, weight, padding, stride);
  torch::stable::copy_(result, sums);
  const int64_t K = out.size(1), rows = out.numel() / K;
  const float* factors = scale ? data<float>(*scale) : nullptr;
  torch::stable::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float* y = data<float>(out) + row * K;
      for (int64_t k = 0; k < K; ++k) {
        float value = factors ? y[k] * factors[k] : y[k];
        value += epilogue.shift[k];
        if (epilogue.residual) value += epilogue.residual[row * K + k];
        y[k] = epilogue.relu && value < 0 ? 0.0f : value;
      }
    }
  });
}

Tensor winograd_conv3x3_add_relu(const Tensor& x, const Tensor& weight, const Tensor& packed,
                                 const OptionalTensor& scale, const OptionalTensor& shift,
                                 const OptionalTensor& residual, int64_t padding, bool relu, int64_t stride) {
  check_winograd_conv3x3_add_relu(x, weight, packed, scale, shift, padding, stride);
  const auto outputs = [&](int64_t pixels) { return (pixels + 2 * padding - 3) / stride + 1; };
  const int64_t K = weight.size(0), P = outputs(x.size(2)), Q = outputs(x.size(3));
  Tensor out = empty_images(x.size(0), K, P, Q, ScalarType::Float);
  if (residual) check_like("winograd_conv3x3_add_relu", "residual", *residual, "the result", out);
  if (out.numel() == 0) return out;
  std::vector<float> shifts(packed.size(0) * kPackedColumns);
  if (shift) std::copy_n(data<float>(*shift), K, shifts.data());
  const Epilogue epilogue{shifts.data(), residual ? data<float>(*residual) : nullptr, data<float>(out), relu,
                          kAhead * 2 * K};
  const Stages& at = stages_of(packed);
  const Problem p = problem_of(x, packed, out, padding, stride, at);
  const float* u = data<float>(packed);
  const bool finite = is_small(p) ? by_sum(p, at, u, epilogue) : by_block(p, at, u, epilogue);
  if (!finite) direct(x, weight, scale, epilogue, padding, stride, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("winograd_conv3x3_add_relu", TORCH_BOX(&winograd_conv3x3_add_relu));
}

}  // namespace resnet_fused::cpu
