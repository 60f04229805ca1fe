// The weight of a 3x3 convolution as Winograd's filtering multiplies by it, for winograd_conv3x3_add_relu: scaled and
// transformed in double, rounded once.
// Bytes: weight and packed once.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string_view>

#include "../checks/winograd_conv3x3_add_relu.h"
#include "../checks/winograd_weight3x3.h"
#include "alloc.h"
#include "rows.h"
#include "winograd_stages.h"
#include "winograd_work.h"

namespace resnet_fused::cpu {
namespace {

// The channels [begin, end) of one row of panels, which lies at u.
using Transform = void(const Problem&, int64_t, int64_t, int64_t, const float*, float*);

template <class L, class F>
RESNET_FUSED_INLINE void transform_row(const Problem& p, int64_t row, int64_t begin, int64_t end, const float* scale,
                                       float* u) {
  constexpr int64_t kPanels = kPackedColumns / L::panel;
  for (int64_t i = 0; i < kPanels; ++i) {
    if ((row * kPanels + i) * L::panel >= p.K) {  // beyond the last channel
      for (int64_t line = 0; line < F::values * p.C; ++line) {
        if (line % p.C < begin || line % p.C >= end) continue;
        std::fill_n(u + line * kPackedColumns + i * L::panel, L::panel, 0.0f);
      }
      continue;
    }
    transform_weights<L, F, double>(p, row * kPanels + i, begin, end, scale, u + i * L::panel);
  }
}

#define RESNET_FUSED_TRANSFORM(NAME, LEVEL, TARGET, F)                                                        \
  TARGET void NAME(const Problem& p, int64_t row, int64_t begin, int64_t end, const float* scale, float* u) { \
    transform_row<LEVEL, F>(p, row, begin, end, scale, u);                                                    \
  }
#define RESNET_FUSED_LEVELS(NAME, F)                                                   \
  RESNET_FUSED_TRANSFORM(NAME##_512, Level512, RESNET_FUSED_TARGET_512, F)             \
  RESNET_FUSED_TRANSFORM(NAME##_256, Level256, RESNET_FUSED_TARGET_256, F)             \
  RESNET_FUSED_TRANSFORM(NAME##_128, Level128, , F)                                    \
  Transform* NAME() {                                                                  \
    static const std::string_view level = cpu_level();                                 \
    return level == "avx512" ? NAME##_512 : level == "avx2" ? NAME##_256 : NAME##_128; \
  }
RESNET_FUSED_LEVELS(two, Filtering<2>)
RESNET_FUSED_LEVELS(four, Filtering<4>)
RESNET_FUSED_LEVELS(strided, Strided)
#undef RESNET_FUSED_LEVELS
#undef RESNET_FUSED_TRANSFORM

Tensor winograd_weight3x3(const Tensor& weight, const OptionalTensor& scale, int64_t outputs, int64_t stride) {
  check_winograd_weight3x3(weight, scale, outputs, stride);
  Problem p{};
  p.K = weight.size(0), p.C = weight.size(1), p.outputs = outputs, p.stride = stride;
  p.stride_k = weight.stride(0), p.stride_c = weight.stride(1);
  p.stride_r = weight.stride(2), p.stride_s = weight.stride(3);
  p.u_pitch = kPackedColumns;
  const int64_t rows = (p.K + kPackedColumns - 1) / kPackedColumns, values = p.values();
  const int64_t line = kPackedColumns, plane = p.C * line;
  Tensor packed = empty_strided<4>({rows, values, p.C, line}, {values * plane, plane, line, 1}, ScalarType::Float);
  if (packed.numel() == 0) return packed;
  p.weight = data<float>(weight);
  const float* factors = scale ? data<float>(*scale) : nullptr;
  constexpr int64_t kChannels = 64;  // a unit of work
  const int64_t parts = (p.C + kChannels - 1) / kChannels;
  Transform* run = stride == 2 ? strided() : outputs == 2 ? two() : four();
  share(rows * parts, [&] {
    return [&](int64_t unit) {
      const int64_t row = unit / parts, begin = unit % parts * kChannels, end = std::min(p.C, begin + kChannels);
      run(p, row, begin, end, factors, data<float>(packed) + row * p.u_size());
    };
  });
  return packed;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { m.impl("winograd_weight3x3", TORCH_BOX(&winograd_weight3x3)); }

}  // namespace resnet_fused::cpu
