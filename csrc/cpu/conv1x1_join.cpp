// The join of a residual block as one matrix product per tile of rows: batch norm, residual or projection and ReLU meet
// the sums in the first-level cache, and the output is written once.
// Bytes: x, the pixels of x2, the residual and the output once; FLOPs 2*M*K*(C + C2).
#include <torch/csrc/stable/library.h>

#include <string_view>
#include <tuple>
#include <vector>

#include "../checks/conv1x1_join.h"
#include "alloc.h"
#include "bits.h"
#include "conv1x1_stages.h"
#include "rows.h"

namespace resnet_fused::cpu {
namespace {

struct Join {
  Conv1x1 branch, projection;  // the latter's weight null: there is none
  const float *scale, *shift, *residual, *residual_scale, *residual_shift, *scale2, *shift2;
  const float* factor;  // [N] or null
  float* out;           // [rows, K]
  int64_t rows_per_sample;
  bool relu;

  int64_t scratch() const { return branch.scratch() + projection.scratch(); }
};

template <class V>
RESNET_FUSED_INLINE void join_lanes(const Join& p, const float* y, const float* y2, int64_t row, int64_t k) {
  const int64_t at = row * p.branch.K + k;
  V value, factor, term;
  load_lanes(value, y), load_lanes(factor, p.scale + k), load_lanes(term, p.shift + k);
  value = value * factor + term;
  if (p.factor) value *= p.factor[row / p.rows_per_sample];
  if (p.residual) {
    V residual;
    load_lanes(residual, p.residual + at);
    if (p.residual_scale) {
      load_lanes(factor, p.residual_scale + k), load_lanes(term, p.residual_shift + k);
      residual = residual * factor + term;
    }
    value += residual;
  }
  if (p.projection.weight) {
    V other;
    load_lanes(other, y2), load_lanes(factor, p.scale2 + k), load_lanes(term, p.shift2 + k);
    value += other * factor + term;
  }
  const V zero = {};
  if (p.relu) value = value < zero ? zero : value;
  store_lanes(p.out + at, value);
}

// The products of a panel for the rows whose input is in the scratch, and that input written before the first.
template <class L>
RESNET_FUSED_INLINE float* multiply_panel(const Conv1x1& p, int64_t rows, int64_t panel, float* scratch, Ahead& ahead) {
  float* y = scratch + Conv1x1::kTile * p.pitch();
  multiply_rows<L>(rows, scratch, p.pitch(), p.packed + panel * p.C * L::panel, p.C, y, L::panel, ahead);
  return y;
}

template <class L>
RESNET_FUSED_INLINE void join_tile(const Join& p, int64_t row, int64_t rows, float* scratch) {
  float* second = scratch + p.branch.scratch();
  const Conv1x1 &branch = p.branch, &other = p.projection;
  write_activation<L>(branch.input, row, rows, 0, branch.C, scratch, branch.pitch());
  if (other.weight) write_activation<L>(other.input, row, rows, 0, other.C, second, other.pitch());
  const int64_t later = std::min(Conv1x1::kTile, branch.rows - row - rows),
                calls = branch.panels * (rows / L::rows + 1);
  Ahead ahead(branch.input.x + (row + rows) * branch.C, later * branch.C, calls), none(nullptr, 0, 1);
  for (int64_t panel = 0; panel < branch.panels; ++panel) {
    const int64_t k = panel * L::panel, columns = std::min(L::panel, branch.K - k);
    const int64_t vectors = columns / L::lanes * L::lanes;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < columns; j += 16) {
        __builtin_prefetch(p.out + (row + r) * branch.K + k + j, 1);
        if (p.residual) __builtin_prefetch(p.residual + (row + r) * branch.K + k + j);
      }
    }
    const float* y = multiply_panel<L>(branch, rows, panel, scratch, ahead);
    const float* y2 = other.weight ? multiply_panel<L>(other, rows, panel, second, none) : y;
    for (int64_t r = 0; r < rows; ++r) {
      const float *from = y + r * L::panel, *from2 = y2 + r * L::panel;
      for (int64_t j = 0; j < vectors; j += L::lanes) {
        join_lanes<typename L::Vector>(p, from + j, from2 + j, row + r, k + j);
      }
      for (int64_t j = vectors; j < columns; ++j) join_lanes<float>(p, from + j, from2 + j, row + r, k + j);
    }
  }
}

struct Stages {
  int64_t panel;
  void (*pack)(const Conv1x1&, int64_t, float*);
  void (*tile)(const Join&, int64_t, int64_t, float*);
};

template <class L>
struct At;

#define RESNET_FUSED_STAGES(LEVEL, TARGET)                                                                             \
  template <>                                                                                                          \
  struct At<LEVEL> {                                                                                                   \
    TARGET static void pack(const Conv1x1& p, int64_t panel, float* packed) { pack_outputs<LEVEL>(p, panel, packed); } \
    TARGET static void tile(const Join& p, int64_t row, int64_t rows, float* scratch) {                                \
      join_tile<LEVEL>(p, row, rows, scratch);                                                                         \
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

AlignedArray<float> pack(Conv1x1& p, const Stages& at) {
  auto packed = aligned_array<float>(p.weight ? p.panels * p.C * p.panel + 1 : 1);
  p.packed = packed.get();
  share_units(p.weight ? p.panels : 0,
              [&] { return [&](int64_t panel) { at.pack(p, panel, packed.get() + panel * p.C * p.panel); }; });
  return packed;
}

void run(Join p, uint8_t* mask) {
  const Stages& at = stages();
  const int64_t K = p.branch.K, tiles = (p.branch.rows + Conv1x1::kTile - 1) / Conv1x1::kTile;
  for (Conv1x1* conv : {&p.branch, &p.projection}) conv->panel = at.panel, conv->panels = (K + at.panel - 1) / at.panel;
  const auto packed = pack(p.branch, at), packed2 = pack(p.projection, at);
  share_units(K ? tiles : 0, [&] {
    return [&, scratch = aligned_array<float>(p.scratch())](int64_t tile) {
      const int64_t row = tile * Conv1x1::kTile, rows = std::min(Conv1x1::kTile, p.branch.rows - row);
      at.tile(p, row, rows, scratch.get());
      if (mask) pack_rows(mask + row * mask_bytes(K), p.out + row * K, rows, K);
    };
  });
}

std::tuple<Tensor, Tensor> conv1x1_join(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift,
                                        const OptionalTensor& x_scale, const OptionalTensor& x_shift,
                                        const OptionalTensor& residual, const OptionalTensor& residual_scale,
                                        const OptionalTensor& residual_shift, const OptionalTensor& x2,
                                        const OptionalTensor& weight2, const OptionalTensor& scale2,
                                        const OptionalTensor& shift2, const std::vector<int64_t>& stride2,
                                        const OptionalTensor& sample_factor, bool relu, bool emit_mask) {
  check_conv1x1_join(x, weight, scale, shift, x_scale, x_shift, {residual, residual_scale, residual_shift},
                     {x2, weight2, scale2, shift2, stride2}, sample_factor);
  const int64_t N = x.size(0), H = x.size(2), W = x.size(3), C = x.size(1), K = weight.size(0), rows = N * H * W;
  Tensor out = empty_images(N, K, H, W, ScalarType::Float);
  Tensor mask = emit_mask ? empty_mask(out) : empty_vector(0, ScalarType::Byte);
  Join p{};
  const Activation input{data<float>(x), data<float>(x_scale), data<float>(x_shift), C, Pixels(x, {1, 1})};
  p.branch = {input, data<float>(weight), nullptr, nullptr, rows, C, K, 0, 0};
  if (x2) {
    const Activation second{data<float>(x2), nullptr, nullptr, x2->size(1), Pixels(*x2, stride2)};
    p.projection = {second, data<float>(weight2), nullptr, nullptr, rows, x2->size(1), K, 0, 0};
  }
  p.scale = data<float>(scale), p.shift = data<float>(shift), p.residual = data<float>(residual);
  p.residual_scale = data<float>(residual_scale), p.residual_shift = data<float>(residual_shift);
  p.scale2 = data<float>(scale2), p.shift2 = data<float>(shift2), p.factor = data<float>(sample_factor);
  p.out = data<float>(out), p.rows_per_sample = H * W, p.relu = relu;
  run(p, emit_mask ? data<uint8_t>(mask) : nullptr);
  return {out, mask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { m.impl("conv1x1_join", TORCH_BOX(&conv1x1_join)); }

}  // namespace resnet_fused::cpu
